//! Small bar charts: shares of a whole.

use std::fmt::Write;

use super::series::range;
use super::svg::{place, title_of, SMALL};
use super::text::{escape, number};

/// A small bar chart.
#[derive(Clone, Debug, Default)]
pub struct Bars {
    /// What it shows.
    pub title: String,
    /// A longer name.
    pub hint: String,
    /// Heights as shares of 1.
    pub shares: Vec<f64>,
    /// What stands under the first and the last bar.
    pub ends: (String, String),
    /// The number of its colour.
    pub colour: usize,
}

/// Bars above this are added up in equal groups.
const MOST_BARS: usize = 64;

impl Bars {
    /// The chart as a `figure`; nothing where there are no bars.
    pub fn html(&self) -> String {
        let mut out = String::new();
        let group = self.shares.len().div_ceil(MOST_BARS).max(1);
        let shares: Vec<f64> = self.shares.chunks(group).map(|c| c.iter().sum()).collect();
        let Some((_, high)) = range(shares.iter().copied()) else { return out };
        let (frame, high) = (SMALL, high.max(1e-12));
        // As wide as its neighbours in height, without an axis at the left.
        let (left, top, bottom) = (8.0, 18.0, frame.height - frame.bottom);
        let width = (frame.width - left - frame.right) / shares.len() as f64;
        let gap = (width * 0.2).min(4.0);
        let _ = write!(out, "<figure class=\"chart small\"><figcaption{}>", title_of(&self.hint));
        let _ = write!(out, "<b>{}</b></figcaption>", escape(&self.title));
        let _ = write!(out, "<svg viewBox=\"0 0 {} {}\" role=\"img\"", frame.width, frame.height);
        let _ = write!(out, " aria-label=\"{}\">", escape(&self.title));
        let few = shares.len() <= 8;
        let each: Vec<String> = shares.iter().map(|s| format!("{} %", number(100.0 * s))).collect();
        let said = if shares.len() <= 20 { each.join(", ") } else { String::new() };
        let _ = write!(out, "<g class=\"bars c{}\"><title>{said}</title><path d=\"", self.colour % 8);
        for (i, share) in shares.iter().enumerate() {
            let (x, tall) = (left + width * i as f64 + gap / 2.0, (bottom - top) * share.max(0.0) / high);
            let (x, wide) = (place(x), place(width - gap));
            let _ = write!(out, "M{x} {bottom}v-{}h{wide}V{bottom}z", place(tall));
        }
        let _ = write!(out, "\"/></g><g class=\"axis\"><path d=\"M{left} {bottom}H{}\"/>", frame.width - 8.0);
        for (i, share) in shares.iter().enumerate().filter(|(_, share)| few || **share == high) {
            let (x, y) = (left + width * (i as f64 + 0.5), bottom - (bottom - top) * share.max(0.0) / high);
            let wide = x.clamp(left + 16.0, frame.width - 24.0);
            let _ = write!(out, "<text class=\"m\" x=\"{wide:.1}\" y=\"{:.1}\">{}", y - 4.0, percent(*share));
            out += "</text>";
            if !few {
                break;
            }
        }
        let under = frame.height - 5.0;
        let _ = write!(out, "<text x=\"{left}\" y=\"{under}\">{}</text>", escape(&self.ends.0));
        let right = frame.width - frame.right;
        let _ = write!(out, "<text class=\"e\" x=\"{right}\" y=\"{under}\">{}</text>", escape(&self.ends.1));
        out += "</g></svg></figure>\n";
        out
    }
}

/// A share as a percentage of at most three figures.
fn percent(share: f64) -> String {
    let value = 100.0 * share;
    match value {
        v if v >= 10.0 => format!("{v:.0} %"),
        v if v >= 1.0 => format!("{v:.1} %"),
        v => format!("{v:.2} %"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_of_many_levels_are_added_up() {
        let html = Bars { shares: vec![1.0 / 256.0; 256], ..Bars::default() }.html();
        assert_eq!(html.matches("v-").count(), 64);
        let html = Bars { shares: vec![0.21, 0.29, 0.29, 0.21], ..Bars::default() }.html();
        assert!(html.contains("21 %, 29 %, 29 %, 21 %"), "{html}");
        assert!(Bars::default().html().is_empty());
    }
}
