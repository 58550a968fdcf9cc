//! Numbers and Markdown tables.

/// A Markdown table. The first column is text, the others are numbers.
pub fn table(columns: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let head: Vec<String> = columns.iter().map(ToString::to_string).collect();
    let rule: Vec<String> = (0..columns.len()).map(|n| if n == 0 { "--" } else { "--:" }.into()).collect();
    let rows: String = rows.into_iter().map(|row| line(&row)).collect();
    [line(&head), line(&rule), rows].concat()
}

/// `12,345`
pub fn thousands(number: f64) -> String {
    let digits = format!("{number:.0}");
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}

/// `10 thousand`, `1 million`
pub fn amount(number: u64) -> String {
    match number {
        1_000_000.. => format!("{} million", number / 1_000_000),
        _ => format!("{} thousand", number / 1_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_easy_to_read() {
        assert_eq!([0.4, 999.0, 1000.0, 1234567.0].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([10_000, 10_000_000].map(amount), ["10 thousand", "10 million"]);
    }
}
