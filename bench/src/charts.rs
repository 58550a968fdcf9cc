//! The charts, as SVG on a white background, which is readable on dark pages too.

use std::path::Path;

use plotters::{
    coord::ranged1d::{AsRangedCoord, ValueFormatter},
    prelude::*,
    series::DashedLineSeries,
};

use crate::{
    feed::DELIVERY,
    format::thousands,
    plan::{LOADS, Plan, Variant},
    requests::Work,
    results::{Cell, Results, Section, Summary},
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
const FONT: &str = "sans-serif";

struct Line {
    label: &'static str,
    colour: RGBColor,
    is_dashed: bool,
    /// One value per step of the x axis.
    values: Vec<f64>,
}

/// Writes all charts into a directory.
pub fn write(results: &Results, plan: &Plan, dir: &Path) -> anyhow::Result<()> {
    let [rate, latency, cpu, delivery] = FILES.map(|(file, title)| (dir.join(file), title));
    let at_loads = |work, variant, figure: fn(&Cell) -> f64| {
        let key = |load| Section::Calls.key(work, variant, load, plan.users);
        LOADS.map(|(load, _)| Summary::of(&results.each(key(load), figure)).median).to_vec()
    };
    let line = |label, colour, is_dashed, values| Line { label, colour, is_dashed, values };
    let loads = LOADS.map(|(load, _)| load.to_string());
    let (coalesced, single) = (Variant::Coalesced, Variant::Single);

    let calls =
        |label, colour, work, variant| line(label, colour, false, at_loads(work, variant, |cell| cell.rate));
    let pgbench = Summary::of(&best_of_pgbench(results, plan, Work::GetById)).median;
    let lines = [
        calls("empty call", GREY, Work::Empty, coalesced),
        calls("GetUser", BLUE, Work::GetById, coalesced),
        calls("GetUser, coalescing off", PURPLE, Work::GetById, single),
        line("pgbench, same SELECT", ORANGE, true, vec![pgbench; LOADS.len()]),
    ];
    let axes = ["calls in flight", "calls/s"];
    draw_lines(&rate.0, rate.1, axes, &loads, 0.0..highest(&lines) * 1.05, &lines)?;

    let p99 = |label, colour, work, variant| {
        line(label, colour, variant == single, at_loads(work, variant, |cell| cell.p99))
    };
    let lines = [
        p99("GetUser", BLUE, Work::GetById, coalesced),
        p99("GetUser, coalescing off", BLUE, Work::GetById, single),
        p99("CreateUser", GREEN, Work::Create, coalesced),
        p99("CreateUser, coalescing off", GREEN, Work::Create, single),
    ];
    let lowest = lines.iter().flat_map(|line| line.values.iter().copied()).fold(f64::MAX, f64::min);
    let power = |value: f64| 10_f64.powf(value);
    let range = power(lowest.log10().floor())..power(highest(&lines).log10().ceil());
    draw_lines(&latency.0, latency.1, ["calls in flight", "ms"], &loads, range.log_scale(), &lines)?;

    let delivered = |label, colour, is_dashed, index: usize| {
        let values = DELIVERY.iter().filter_map(|(_, figures)| figures.get(index));
        let values = values.map(|figure| Summary::of(results.figure(*figure)).median);
        line(label, colour, is_dashed, values.collect())
    };
    let lines = [
        delivered("same replica, p99", BLUE, false, 1),
        delivered("another replica, p99", ORANGE, false, 3),
        delivered("same replica, median", BLUE, true, 0),
        delivered("another replica, median", ORANGE, true, 2),
    ];
    let shares = DELIVERY.map(|(share, _)| format!("{:.0} %", share * 100.0));
    let axes = ["of the highest create rate", "ms"];
    draw_lines(&delivery.0, delivery.1, axes, &shares, 0.0..highest(&lines) * 1.05, &lines)?;

    let bars = [Work::GetById, Work::Create, Work::Update]
        .into_iter()
        .flat_map(|work| [(work, coalesced, ""), (work, single, ", coalescing off")]);
    let bars = bars.filter_map(|(work, variant, suffix)| {
        let cell = results.median(Section::Calls.key(work, variant, 512, plan.users))?;
        Some((format!("{}{suffix}", work.name()), cell))
    });
    draw_bars(&cpu.0, cpu.1, &bars.collect::<Vec<_>>())
}

fn highest(lines: &[Line]) -> f64 {
    lines.iter().flat_map(|line| line.values.iter().copied()).fold(f64::MIN_POSITIVE, f64::max)
}

fn draw_lines<Y>(
    file: &Path,
    title: &str,
    [x_axis, y_axis]: [&str; 2],
    steps: &[String],
    y_range: Y,
    lines: &[Line],
) -> anyhow::Result<()>
where
    Y: AsRangedCoord<Value = f64>,
    Y::CoordDescType: ValueFormatter<f64>,
{
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let last = steps.len() as f64 - 1.0;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, (FONT, 22))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d(-0.1..last + 0.1, y_range)?;
    let step = |x: &f64| match x.fract() {
        0.0 => steps.get(*x as usize).cloned().unwrap_or_default(),
        _ => String::new(),
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .label_style((FONT, 16))
        .x_labels(steps.len())
        .x_label_formatter(&step)
        .y_label_formatter(&|value| if *value < 1000.0 { value.to_string() } else { thousands(*value) })
        .x_desc(x_axis)
        .y_desc(y_axis)
        .draw()?;
    for line in lines {
        let points: Vec<(f64, f64)> = line.values.iter().enumerate().map(|(x, y)| (x as f64, *y)).collect();
        let style = line.colour.stroke_width(2);
        let series = if line.is_dashed {
            chart.draw_series(DashedLineSeries::new(points, 6, 5, style))?
        } else {
            chart.draw_series(LineSeries::new(points, style).point_size(4))?
        };
        let is_dashed = line.is_dashed;
        series.label(line.label).legend(move |(x, y)| {
            let path = |from, to| PathElement::new([(x + from, y), (x + to, y)], style);
            EmptyElement::at((0, 0)) + path(0, if is_dashed { 7 } else { 18 }) + path(11, 18)
        });
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .label_font((FONT, 16))
        .draw()?;
    area.present()?;
    Ok(())
}

/// One bar per cell, with the parts of the service and of the database.
fn draw_bars(file: &Path, title: &str, bars: &[(String, Cell)]) -> anyhow::Result<()> {
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let highest = bars.iter().map(|(_, cell)| cell.cpu()).fold(f64::MIN_POSITIVE, f64::max);
    let mut chart = ChartBuilder::on(&area)
        .caption(title, (FONT, 22))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(190)
        .build_cartesian_2d(0.0..highest * 1.1, (0..bars.len().saturating_sub(1)).into_segmented())?;
    let name = |bar: &SegmentValue<usize>| match bar {
        SegmentValue::CenterOf(n) => bars.get(*n).map(|(name, _)| name.clone()).unwrap_or_default(),
        _ => String::new(),
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .label_style((FONT, 16))
        .y_labels(bars.len())
        .y_label_formatter(&name)
        .x_desc("µs, 512 calls in flight")
        .draw()?;
    for (label, colour) in [("service", BLUE), ("PostgreSQL", ORANGE)] {
        let bar = |(n, (_, cell)): (usize, &(String, Cell))| {
            let [from, to] = if colour == BLUE { [0.0, cell.service] } else { [cell.service, cell.cpu()] };
            let corners = [(from, SegmentValue::Exact(n)), (to, SegmentValue::Exact(n + 1))];
            let mut bar = Rectangle::new(corners, colour.filled());
            bar.set_margin(12, 12, 0, 0);
            bar
        };
        chart
            .draw_series(bars.iter().enumerate().map(bar))?
            .label(label)
            .legend(move |(x, y)| Rectangle::new([(x, y - 6), (x + 12, y + 6)], colour.filled()));
    }
    let totals = bars.iter().enumerate().map(|(n, (_, cell))| {
        let style = (FONT, 16).into_font();
        Text::new(format!(" {:.0}", cell.cpu()), (cell.cpu(), SegmentValue::CenterOf(n)), style)
    });
    chart.draw_series(totals)?;
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font((FONT, 16))
        .draw()?;
    area.present()?;
    Ok(())
}
