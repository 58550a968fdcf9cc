//! What the charts show.

use std::{fs, path::Path};

use crate::{
    bar::best_of_pgbench,
    calls::Work,
    feed::{Delivery, SHARES},
    results::{Cell, Summary},
    run::{By, Findings, LOADS},
    svg::{Bar, Bars, Line, Lines},
};

/// The files, and what they show.
pub const FILES: [(&str, &str); 4] = [
    ("rate.svg", "Calls a second"),
    ("latency.svg", "99th percentile of latency"),
    ("cpu.svg", "CPU time of a call"),
    ("delivery.svg", "From the beginning of a transaction to the delivery of its change"),
];

// Colours that can be told apart without red or green, too.
const BLUE: &str = "#0072b2";
const ORANGE: &str = "#d55e00";
const GREEN: &str = "#007d5b";
const PURPLE: &str = "#a5498d";
const GREY: &str = "#59636e";

/// Draws all charts.
pub fn write(findings: &Findings, dir: &Path) -> anyhow::Result<()> {
    let charts = [rate(findings), latency(findings), cpu(findings), delivery(findings)];
    for ((file, _), svg) in FILES.iter().zip(charts) {
        fs::write(dir.join(file), svg)?;
    }
    Ok(())
}

fn rate(findings: &Findings) -> String {
    let line = |label: &str, colour, work, by| Line {
        label: label.into(),
        colour,
        is_dashed: false,
        values: at_each_load(findings, work, by, |cell| cell.rate),
    };
    let pgbench = Line {
        label: "pgbench, same SELECT".into(),
        colour: ORANGE,
        is_dashed: true,
        values: vec![Summary::of(best_of_pgbench(findings, Work::GetById)).median; LOADS.len()],
    };
    lines(
        "Calls a second",
        "more is better",
        false,
        vec![
            line("empty call", GREY, Work::Empty, By::Grouped),
            line("GetUser, grouped", BLUE, Work::GetById, By::Grouped),
            line("GetUser, GROUPING=off", PURPLE, Work::GetById, By::Single),
            pgbench,
        ],
    )
}

fn latency(findings: &Findings) -> String {
    let line = |label: &str, colour, work, by| Line {
        label: label.into(),
        colour,
        is_dashed: by == By::Single,
        values: at_each_load(findings, work, by, Cell::p99),
    };
    lines(
        "99th percentile of latency",
        "milliseconds, less is better",
        true,
        vec![
            line("GetUser, grouped", BLUE, Work::GetById, By::Grouped),
            line("GetUser, GROUPING=off", BLUE, Work::GetById, By::Single),
            line("CreateUser, grouped", GREEN, Work::Create, By::Grouped),
            line("CreateUser, GROUPING=off", GREEN, Work::Create, By::Single),
        ],
    )
}

fn cpu(findings: &Findings) -> String {
    let rows = [Work::GetById, Work::Create, Work::Update]
        .into_iter()
        .flat_map(|work| [(work, By::Grouped, "grouped"), (work, By::Single, "GROUPING=off")]);
    let bars = rows.filter_map(|(work, by, how)| {
        let cell = findings.points.median((work, by, 512))?;
        Some(Bar { label: format!("{}, {how}", work.name()), values: vec![cell.service, cell.database] })
    });
    Bars {
        title: "CPU time of a call",
        unit: "microseconds, 512 calls in flight, less is better",
        parts: vec![("service", BLUE), ("PostgreSQL", ORANGE)],
        bars: bars.collect(),
    }
    .to_svg()
}

fn delivery(findings: &Findings) -> String {
    let line = |label: &str, colour, is_dashed, figures: fn(&Delivery) -> &Vec<f64>| Line {
        label: label.into(),
        colour,
        is_dashed,
        values: findings.feed.delivery.iter().map(|d| Summary::of(figures(d).clone()).median).collect(),
    };
    Lines {
        title: "From the beginning of a transaction to the delivery of its change",
        unit: "milliseconds, less is better",
        steps: SHARES.map(|share| format!("{:.0} %", share * 100.0)).to_vec(),
        step: "of the highest create rate",
        is_logarithmic: false,
        lines: vec![
            line("same replica, p99", BLUE, false, |delivery| &delivery.here.p99),
            line("another replica, p99", ORANGE, false, |delivery| &delivery.there.p99),
            line("same replica, median", BLUE, true, |delivery| &delivery.here.median),
            line("another replica, median", ORANGE, true, |delivery| &delivery.there.median),
        ],
    }
    .to_svg()
}

fn lines(title: &'static str, unit: &'static str, is_logarithmic: bool, lines: Vec<Line>) -> String {
    let steps = LOADS.map(|(in_flight, _)| in_flight.to_string()).to_vec();
    Lines { title, unit, steps, step: "calls in flight", is_logarithmic, lines }.to_svg()
}

fn at_each_load(findings: &Findings, work: Work, by: By, figure: fn(&Cell) -> f64) -> Vec<f64> {
    LOADS
        .iter()
        .map(|(in_flight, _)| Summary::of(findings.points.each((work, by, *in_flight), figure)).median)
        .collect()
}
