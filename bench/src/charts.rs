//! The charts, as SVG on a white background, which is readable on dark pages too.

use std::path::Path;

use anyhow::Result;
use plotters::{
    coord::ranged1d::{AsRangedCoord, ValueFormatter},
    prelude::*,
    series::DashedLineSeries,
    style::text_anchor::{HPos, Pos, VPos},
};

use crate::{
    feed::DELIVERY,
    format::thousands,
    plan::{LOADS, Plan, Variant},
    requests::Work,
    results::{Cell, Results, Section},
    targets::best_of_pgbench,
};

/// The files and their titles.
pub const FILES: [(&str, &str); 4] = [
    ("rate.svg", "Calls per second"),
    ("latency.svg", "99th percentile of the latency"),
    ("cpu.svg", "CPU time per call"),
    ("delivery.svg", "From the start of a transaction to the delivery of its change"),
];

// Colours that are distinct for colour-blind readers.
const BLUE: RGBColor = RGBColor(0, 114, 178);
const ORANGE: RGBColor = RGBColor(213, 94, 0);
const GREEN: RGBColor = RGBColor(0, 125, 91);
const PURPLE: RGBColor = RGBColor(165, 73, 141);
const GREY: RGBColor = RGBColor(89, 99, 110);
const GRID: RGBColor = RGBColor(228, 231, 235);

const SIZE: (u32, u32) = (760, 400);
const TITLE_FONT: (&str, u32) = ("sans-serif", 22);
const FONT: (&str, u32) = ("sans-serif", 16);

/// A label, a colour, whether it is dashed, and a value per step of the x axis.
type Line = (&'static str, RGBColor, bool, Vec<f64>);

/// Writes all charts into a directory.
pub fn write(results: &Results, plan: &Plan, dir: &Path) -> Result<()> {
    let [rate, latency, cpu, delivery] = FILES.map(|(file, title)| (dir.join(file), title));
    let at_loads = |work, variant, figure: fn(&Cell) -> f64| {
        let key = |load| Section::Calls.key(work, variant, load, plan.users);
        LOADS.map(|(load, _)| results.each(key(load), figure).median()).to_vec()
    };
    let rates = |work, variant| at_loads(work, variant, |cell| cell.rate);
    let p99s = |work, variant| at_loads(work, variant, |cell| cell.p99);
    let delivered = |index: usize| {
        let figures = DELIVERY.iter().filter_map(|(_, figures)| figures.get(index));
        figures.map(|figure| results.figure(*figure).median()).collect()
    };
    let (coalesced, single) = (Variant::Coalesced, Variant::Single);
    let loads = LOADS.map(|(load, _)| load.to_string());
    let pgbench = best_of_pgbench(results, plan, Work::GetById).median();

    let lines = [
        ("empty call", GREY, false, rates(Work::Empty, coalesced)),
        ("GetUser", BLUE, false, rates(Work::GetById, coalesced)),
        ("GetUser, coalescing off", PURPLE, false, rates(Work::GetById, single)),
        ("pgbench, same SELECT", ORANGE, true, vec![pgbench; LOADS.len()]),
    ];
    draw_lines(&rate.0, rate.1, ["calls in flight", "calls/s"], &loads, 0.0..highest(&lines), &lines)?;

    let lines = [
        ("GetUser", BLUE, false, p99s(Work::GetById, coalesced)),
        ("GetUser, coalescing off", BLUE, true, p99s(Work::GetById, single)),
        ("CreateUser", GREEN, false, p99s(Work::Create, coalesced)),
        ("CreateUser, coalescing off", GREEN, true, p99s(Work::Create, single)),
    ];
    let range = (0.01..highest(&lines) * 2.0).log_scale();
    draw_lines(&latency.0, latency.1, ["calls in flight", "ms"], &loads, range, &lines)?;

    let lines = [
        ("same replica, p99", BLUE, false, delivered(1)),
        ("another replica, p99", ORANGE, false, delivered(3)),
        ("same replica, median", BLUE, true, delivered(0)),
        ("another replica, median", ORANGE, true, delivered(2)),
    ];
    let (shares, axes) =
        (DELIVERY.map(|(share, _)| format!("{:.0} %", share * 100.0)), ["of the highest create rate", "ms"]);
    draw_lines(&delivery.0, delivery.1, axes, &shares, 0.0..highest(&lines), &lines)?;

    // The first bar is at the bottom.
    let works = [Work::Update, Work::Create, Work::GetById].into_iter();
    let rows = works.flat_map(|work| [(work, single, ", coalescing off"), (work, coalesced, "")]);
    let bars = rows.map(|(work, variant, suffix)| {
        let key = Section::Calls.key(work, variant, 512, plan.users);
        let each = |figure: fn(&Cell) -> f64| results.each(key, figure).median();
        let [service, database] = [each(|cell| cell.service), each(|cell| cell.database)];
        (format!("{}{suffix}", work.name()), [service, service + database])
    });
    draw_bars(&cpu.0, cpu.1, &bars.collect::<Vec<_>>())
}

/// The end of an axis, above all values.
fn highest(lines: &[Line]) -> f64 {
    lines.iter().flat_map(|(.., values)| values).fold(f64::MIN_POSITIVE, |a, b| a.max(*b)) * 1.05
}

fn draw_lines<Y>(
    file: &Path,
    title: &str,
    [x_axis, y_axis]: [&str; 2],
    steps: &[String],
    y_range: Y,
    lines: &[Line],
) -> Result<()>
where
    Y: AsRangedCoord<Value = f64>,
    Y::CoordDescType: ValueFormatter<f64>,
{
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut builder = ChartBuilder::on(&area);
    builder.caption(title, TITLE_FONT).margin(16).x_label_area_size(44).y_label_area_size(72);
    // The part behind the last step has the legend.
    let width = (steps.len() as f64 - 1.0) * 1.6;
    let mut chart = builder.build_cartesian_2d(-0.1..width, y_range)?;
    let step = |x: &f64| steps.get(*x as usize).filter(|_| x.fract() == 0.0).cloned().unwrap_or_default();
    let value = |y: &f64| if *y < 1000.0 { y.to_string() } else { thousands(*y) };
    let mut mesh = chart.configure_mesh();
    mesh.disable_x_mesh().light_line_style(TRANSPARENT).bold_line_style(GRID).label_style(FONT);
    mesh.x_labels(2 * steps.len()).x_label_formatter(&step).x_desc(x_axis);
    mesh.y_label_formatter(&value).y_desc(y_axis).draw()?;
    for &(label, colour, is_dashed, ref values) in lines {
        let points: Vec<(f64, f64)> = values.iter().enumerate().map(|(x, y)| (x as f64, *y)).collect();
        let style = colour.stroke_width(2);
        let series = if is_dashed {
            chart.draw_series(DashedLineSeries::new(points, 6, 5, style))?
        } else {
            chart.draw_series(LineSeries::new(points, style).point_size(4))?
        };
        series.label(label).legend(move |(x, y)| {
            let path = |from, to| PathElement::new([(x + from, y), (x + to, y)], style);
            EmptyElement::at((0, 0)) + path(0, if is_dashed { 7 } else { 18 }) + path(11, 18)
        });
    }
    let mut legend = chart.configure_series_labels();
    legend.position(SeriesLabelPosition::UpperRight).background_style(WHITE);
    legend.label_font(FONT).draw()?;
    Ok(area.present()?)
}

/// Bars with the end of the service's part, and of the database's part behind it.
fn draw_bars(file: &Path, title: &str, bars: &[(String, [f64; 2])]) -> Result<()> {
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let highest = bars.iter().map(|(_, [_, end])| *end).fold(f64::MIN_POSITIVE, f64::max);
    let mut builder = ChartBuilder::on(&area);
    builder.caption(title, TITLE_FONT).margin(16).x_label_area_size(44).y_label_area_size(210);
    let rows = (0..bars.len().saturating_sub(1)).into_segmented();
    let mut chart = builder.build_cartesian_2d(0.0..highest * 1.1, rows)?;
    let name = |bar: &SegmentValue<usize>| match bar {
        SegmentValue::CenterOf(n) => bars.get(*n).map(|(name, _)| name.clone()).unwrap_or_default(),
        _ => String::new(),
    };
    let mut mesh = chart.configure_mesh();
    mesh.disable_y_mesh().light_line_style(TRANSPARENT).bold_line_style(GRID).label_style(FONT);
    mesh.y_labels(bars.len()).y_label_formatter(&name).x_desc("µs, 512 calls in flight");
    mesh.x_label_formatter(&|x| format!("{x:.0}")).draw()?;
    // The bars to the end are drawn first, and those of the service over them.
    for (label, colour, part) in [("PostgreSQL", ORANGE, 1), ("service", BLUE, 0)] {
        let bar = |(n, (_, ends)): (usize, &(String, [f64; 2]))| {
            let end = ends.get(part).copied().unwrap_or_default();
            let corners = [(0.0, SegmentValue::Exact(n)), (end, SegmentValue::Exact(n + 1))];
            let mut bar = Rectangle::new(corners, colour.filled());
            bar.set_margin(12, 12, 0, 0);
            bar
        };
        let series = chart.draw_series(bars.iter().enumerate().map(bar))?.label(label);
        series.legend(move |(x, y)| Rectangle::new([(x, y - 6), (x + 12, y + 6)], colour.filled()));
    }
    let style = TextStyle::from(FONT.into_font()).pos(Pos::new(HPos::Left, VPos::Center));
    chart.draw_series(bars.iter().enumerate().map(|(n, (_, [_, end]))| {
        Text::new(format!(" {end:.0}"), (*end, SegmentValue::CenterOf(n)), style.clone())
    }))?;
    chart.configure_series_labels().position(SeriesLabelPosition::UpperRight).label_font(FONT).draw()?;
    Ok(area.present()?)
}
