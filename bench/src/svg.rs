//! Two kinds of charts, as SVG that needs no fonts and no scripts: lines over a few
//! steps, and bars of parts.

use crate::report::thousands;

const WIDTH: f64 = 760.0;
const INK: &str = "#1f2328";
const FAINT: &str = "#59636e";
const GRID: &str = "#e4e7eb";

/// A line of a [`Lines`].
pub struct Line {
    pub label: String,
    pub colour: &'static str,
    pub is_dashed: bool,
    /// One a step.
    pub values: Vec<f64>,
}

/// Lines, each with its label at its end.
pub struct Lines {
    pub title: &'static str,
    /// Of the values.
    pub unit: &'static str,
    /// What is beneath each step, and beneath them all.
    pub steps: Vec<String>,
    pub step: &'static str,
    /// Whether ten times as much is always as far, rather than the same amount more.
    pub is_logarithmic: bool,
    pub lines: Vec<Line>,
}

/// Where the values of a chart lie between bottom and top.
struct Scale {
    ticks: Vec<f64>,
    is_logarithmic: bool,
}

impl Scale {
    fn new(values: impl Iterator<Item = f64> + Clone, is_logarithmic: bool) -> Self {
        let most = values.clone().fold(f64::MIN_POSITIVE, f64::max);
        if is_logarithmic {
            let first = values.fold(most, f64::min).log10().floor() as i32;
            let last = most.log10().ceil() as i32;
            return Self { ticks: (first..=last).map(|n| 10_f64.powi(n)).collect(), is_logarithmic };
        }
        // About five steps of 1, 2 or 5 with noughts.
        let rough = most / 5.0;
        let unit = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0].map(|n| n * unit).into_iter().find(|step| *step >= rough);
        let step = step.unwrap_or(10.0 * unit);
        let count = (most / step).ceil() as u32;
        Self { ticks: (0..=count).map(|n| f64::from(n) * step).collect(), is_logarithmic }
    }

    /// 0 at the first tick, 1 at the last.
    fn place(&self, value: f64) -> f64 {
        let on_paper = |value: f64| if self.is_logarithmic { value.log10() } else { value };
        let first = on_paper(self.ticks.first().copied().unwrap_or(0.0));
        let last = on_paper(self.ticks.last().copied().unwrap_or(1.0));
        (on_paper(value) - first) / (last - first)
    }
}

impl Lines {
    pub fn to_svg(&self) -> String {
        const HEIGHT: f64 = 400.0;
        const LEFT: f64 = 72.0;
        const RIGHT: f64 = WIDTH - 210.0;
        const TOP: f64 = 72.0;
        const BOTTOM: f64 = HEIGHT - 56.0;
        let scale =
            Scale::new(self.lines.iter().flat_map(|line| line.values.iter().copied()), self.is_logarithmic);
        let x =
            |step: usize| LEFT + 24.0 + (RIGHT - LEFT - 24.0) * step as f64 / (self.steps.len() - 1) as f64;
        let y = |value: f64| BOTTOM - (BOTTOM - TOP) * scale.place(value);

        let mut svg = String::new();
        for &tick in &scale.ticks {
            let y = y(tick);
            svg += &format!(r#"<path d="M{LEFT} {y:.1}H{RIGHT}" stroke="{GRID}"/>"#);
            svg += &text(LEFT - 8.0, y + 4.0, FAINT, "end", &tick_label(tick));
        }
        for (step, label) in self.steps.iter().enumerate() {
            svg += &text(x(step), BOTTOM + 22.0, FAINT, "middle", label);
        }
        svg += &text((LEFT + RIGHT) / 2.0, BOTTOM + 44.0, FAINT, "middle", self.step);
        for line in &self.lines {
            let colour = line.colour;
            let points: Vec<String> = line
                .values
                .iter()
                .enumerate()
                .map(|(step, value)| format!("{:.1},{:.1}", x(step), y(*value)))
                .collect();
            let dashes = if line.is_dashed { r#" stroke-dasharray="6 5""# } else { "" };
            let points = points.join(" ");
            svg += &format!(
                r#"<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"{dashes}/>"#
            );
            let dots = line.values.iter().enumerate().filter(|_| !line.is_dashed);
            for (step, value) in dots {
                let (x, y) = (x(step), y(*value));
                svg += &format!(r#"<circle cx="{x:.1}" cy="{y:.1}" r="4" fill="{colour}"/>"#);
            }
        }
        let ends = self.lines.iter().map(|line| y(line.values.last().copied().unwrap_or_default()));
        for (line, y) in self.lines.iter().zip(spread(ends.collect(), 18.0)) {
            svg += &text(RIGHT + 12.0, y + 4.0, line.colour, "start", &line.label);
        }
        page(HEIGHT, self.title, self.unit, &svg)
    }
}

/// A bar of a [`Bars`].
pub struct Bar {
    pub label: String,
    /// One a part.
    pub values: Vec<f64>,
}

/// Bars that lie one beneath the other, each made of parts.
pub struct Bars {
    pub title: &'static str,
    pub unit: &'static str,
    /// What the parts are, with their colours.
    pub parts: Vec<(&'static str, &'static str)>,
    pub bars: Vec<Bar>,
}

impl Bars {
    pub fn to_svg(&self) -> String {
        const LEFT: f64 = 230.0;
        const RIGHT: f64 = WIDTH - 64.0;
        const TOP: f64 = 112.0;
        const ROW: f64 = 36.0;
        let total = |bar: &Bar| bar.values.iter().sum::<f64>();
        let scale = Scale::new(self.bars.iter().map(total), false);
        let width = |value: f64| (RIGHT - LEFT) * scale.place(value);

        let mut svg = String::new();
        for (n, (part, colour)) in self.parts.iter().enumerate() {
            let x = LEFT + 110.0 * n as f64;
            svg += &format!(r#"<rect x="{x}" y="76" width="12" height="12" rx="2" fill="{colour}"/>"#);
            svg += &text(x + 18.0, 87.0, INK, "start", part);
        }
        for (n, bar) in self.bars.iter().enumerate() {
            let y = TOP + ROW * n as f64;
            let mut x = LEFT;
            for ((_, colour), value) in self.parts.iter().zip(&bar.values) {
                let width = width(*value);
                svg +=
                    &format!(r#"<rect x="{x:.1}" y="{y}" width="{width:.1}" height="22" fill="{colour}"/>"#);
                x += width;
            }
            svg += &text(LEFT - 12.0, y + 16.0, INK, "end", &bar.label);
            svg += &text(x + 8.0, y + 16.0, INK, "start", &format!("{:.0}", total(bar)));
        }
        page(TOP + ROW * self.bars.len() as f64 + 16.0, self.title, self.unit, &svg)
    }
}

/// White paper, for readers with a dark page too.
fn page(height: f64, title: &str, unit: &str, content: &str) -> String {
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif" font-size="13">
<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>
<text x="24" y="34" fill="{INK}" font-size="17" font-weight="600">{title}</text>
{unit}
{content}
</svg>
"##,
        unit = text(24.0, 54.0, FAINT, "start", unit),
    )
}

fn text(x: f64, y: f64, colour: &str, anchor: &str, text: &str) -> String {
    format!(r#"<text x="{x:.1}" y="{y:.1}" fill="{colour}" text-anchor="{anchor}">{text}</text>"#)
}

fn tick_label(value: f64) -> String {
    if value >= 1000.0 { thousands(value) } else { value.to_string() }
}

/// Moves labels down that would touch the one above.
fn spread(places: Vec<f64>, distance: f64) -> Vec<f64> {
    let mut order: Vec<(usize, f64)> = places.into_iter().enumerate().collect();
    order.sort_by(|(_, a), (_, b)| a.total_cmp(b));
    let mut lowest = f64::MIN;
    for (_, place) in &mut order {
        *place = place.max(lowest + distance);
        lowest = *place;
    }
    order.sort_by_key(|(n, _)| *n);
    order.into_iter().map(|(_, place)| place).collect()
}
