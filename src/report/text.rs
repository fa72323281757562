//! Names and numbers as the page shows them.

/// Text for HTML and its attributes: nothing in it can open a tag, close a quote or hide.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.push('\u{FFFD}'),
            c => out.push(c),
        }
    }
    out
}

/// A number with four digits that count, whole numbers in full.
pub fn number(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 {
        return "0".into();
    }
    if !value.is_finite() {
        return "–".into();
    }
    if !(1e-4..1e15).contains(&size) {
        return format!("{value:.2e}");
    }
    if size >= 1000.0 {
        return format!("{value:.0}");
    }
    let digits = 3 - size.log10().floor() as i32;
    trimmed(format!("{value:.*}", digits.max(0) as usize))
}

/// A mark of an axis whose marks lie `apart` from one another.
pub fn mark(value: f64, apart: f64) -> String {
    let size = value.abs().max(apart);
    if value == 0.0 {
        return "0".into();
    }
    if size < 1e-3 {
        return trimmed_exponent(value);
    }
    for (unit, letter) in [(1e9, "G"), (1e6, "M"), (1e3, "k")] {
        if size >= 10.0 * unit || (size >= unit && apart >= unit / 10.0) {
            let digits = (-(apart / unit).log10().floor()).clamp(0.0, 6.0) as usize;
            return trimmed(format!("{:.digits$}", value / unit)) + letter;
        }
    }
    let digits = (-apart.log10().floor()).clamp(0.0, 9.0) as usize;
    trimmed(format!("{value:.digits$}"))
}

fn trimmed(text: String) -> String {
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    }
}

fn trimmed_exponent(value: f64) -> String {
    let text = format!("{value:.1e}");
    text.replace(".0e", "e")
}

/// Bytes for people.
pub fn bytes(n: f64) -> String {
    match n {
        n if n < 1024.0 => format!("{n:.0} B"),
        n if n < 1_048_576.0 => format!("{:.1} KiB", n / 1024.0),
        n if n < 1_073_741_824.0 => format!("{:.1} MiB", n / 1_048_576.0),
        n => format!("{:.2} GiB", n / 1_073_741_824.0),
    }
}

/// Seconds for people.
pub fn seconds(s: f64) -> String {
    match s {
        s if s < 120.0 => format!("{} s", number(s)),
        s if s < 7200.0 => format!("{:.1} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// Names cut to what tells them apart: without the dotted beginning that at least half of them share
/// and without `.weight`.
pub fn short_names(names: &[&str]) -> Vec<String> {
    let mut common = "";
    for name in names {
        for (i, _) in name.match_indices('.') {
            let start = &name[..=i];
            let sharing = names.iter().filter(|other| other.starts_with(start)).count();
            if start.len() > common.len() && names.len() > 1 && 2 * sharing >= names.len() {
                common = start;
            }
        }
    }
    let short = |name: &&str| {
        let cut = name.strip_prefix(common).filter(|rest| !rest.is_empty()).unwrap_or(name);
        cut.strip_suffix(".weight").unwrap_or(cut).to_string()
    };
    names.iter().map(short).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_escapes() {
        assert_eq!(
            escape("<script>'a' & \"b\"\u{0}"),
            "&lt;script&gt;&#39;a&#39; &amp; &quot;b&quot;\u{FFFD}"
        );
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (97.75, "97.75"),
            (0.123456, "0.1235"),
            (12345.6, "12346"),
            (1.0, "1"),
            (1e-5, "1.00e-5"),
            (-3.5, "-3.5"),
            (f64::NAN, "–"),
        ] {
            assert_eq!(number(value), text);
        }
        for (value, apart, text) in [
            (0.5, 0.25, "0.5"),
            (100.25, 0.05, "100.25"),
            (2e-5, 1e-5, "2e-5"),
            (1500.0, 500.0, "1.5k"),
            (2000.0, 500.0, "2k"),
            (60.0, 20.0, "60"),
            (20_000_000.0, 5_000_000.0, "20M"),
            (0.003, 0.001, "0.003"),
        ] {
            assert_eq!(mark(value, apart), text);
        }
    }

    #[test]
    fn names_lose_what_they_share() {
        let names =
            ["vit.encoder.layer.0.query.weight", "vit.encoder.layer.1.query.weight", "classifier.weight"];
        assert_eq!(short_names(&names), ["0.query", "1.query", "classifier"]);
        assert_eq!(short_names(&["a.weight"]), ["a"]);
        assert!(short_names(&[]).is_empty());
    }
}
