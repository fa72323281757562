//! Many curves as one picture: a row for each, time from left to right.

use std::fmt::Write;

use super::series::{range, Point};
use super::svg::place;
use super::text::{escape, number};

/// A picture of many curves at once: a row for each, time from left to right, darker for more.
#[derive(Clone, Debug, Default)]
pub struct Heat {
    /// The unit of the values.
    pub unit: String,
    /// The rows: a short name, the whole one, the values.
    pub rows: Vec<(String, String, Vec<Point>)>,
}

/// Columns of a heat map.
const COLUMNS: usize = 60;
/// Shades of a heat map, the lowest for nothing at all.
const SHADES: usize = 9;

impl Heat {
    /// The picture as a `figure`; nothing where there are no rows.
    pub fn html(&self, title: &str) -> String {
        let mut out = String::new();
        let values = || self.rows.iter().flat_map(|(_, _, points)| points);
        let (Some(steps), Some((_, high))) = (range(values().map(|p| p.0)), range(values().map(|p| p.1)))
        else {
            return out;
        };
        let longest = self.rows.iter().map(|(short, _, _)| short.chars().count()).max().unwrap_or(0).min(44);
        let (tall, left) = (14.0, 6.3 * longest as f64 + 10.0);
        let (width, top) = (1160.0, 2.0);
        let height = top + tall * self.rows.len() as f64 + 20.0;
        let mut known: Vec<f64> = values().map(|p| p.0).collect();
        known.sort_by(f64::total_cmp);
        known.dedup();
        let columns = known.len().clamp(1, COLUMNS);
        let wide = (width - left - 60.0) / columns as f64;
        let span = (steps.1 - steps.0).max(f64::MIN_POSITIVE);
        let column = |step: f64| match known.len() <= COLUMNS {
            true => known.partition_point(|k| *k < step),
            false => (((step - steps.0) / span * columns as f64) as usize).min(columns - 1),
        };
        let _ = write!(out, "<figure class=\"chart heat\"><figcaption><b>{}</b>", escape(title));
        let _ = write!(out, " <span class=\"unit\">{}</span><span class=\"ramp\">0", escape(&self.unit));
        (0..SHADES).for_each(|shade| {
            let _ = write!(out, "<i class=\"h{shade}\"></i>");
        });
        let _ = write!(out, "{}</span></figcaption>", number(high));
        let _ = write!(
            out,
            "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">",
            escape(title)
        );
        for (i, (short, long, points)) in self.rows.iter().enumerate() {
            let y = top + tall * i as f64;
            let mut cells: Vec<Option<f64>> = vec![None; columns];
            for (step, value) in points {
                let cell = &mut cells[column(*step)];
                *cell = Some(cell.map_or(*value, |v| v.max(*value)));
            }
            let last = points.last().map(|p| number(p.1)).unwrap_or_default();
            let most = range(points.iter().map(|p| p.1)).map(|r| number(r.1)).unwrap_or_default();
            let unit = &self.unit;
            let say = escape(&format!("{long}: last {last} {unit}, highest {most} {unit}"));
            let _ = write!(out, "<g><title>{say}</title>");
            let name: String = short.chars().take(44).collect();
            let _ = write!(out, "<text class=\"e\" x=\"{:.1}\" y=\"{:.1}\">", left - 6.0, y + 10.5);
            let _ = write!(out, "{}</text>", escape(&name));
            for shade in 0..SHADES {
                let here = |cell: &Option<f64>| cell.is_some_and(|v| shade_of(v, high) == shade);
                let mut path = String::new();
                let mut at = 0;
                while at < columns {
                    let run = cells[at..].iter().take_while(|c| here(c)).count();
                    if run > 0 {
                        let (x, length) = (place(left + wide * at as f64), place(wide * run as f64));
                        let _ = write!(path, "M{x} {y}h{length}v{}h-{length}z", tall - 1.0);
                    }
                    at += run.max(1);
                }
                if !path.is_empty() {
                    let _ = write!(out, "<path class=\"h{shade}\" d=\"{path}\"/>");
                }
            }
            let _ = write!(out, "<text x=\"{}\" y=\"{:.1}\">{last}</text></g>", width - 54.0, y + 10.5);
        }
        let under = height - 5.0;
        let _ = write!(out, "<text x=\"{left:.1}\" y=\"{under}\">step {}</text>", number(steps.0));
        let right = width - 60.0;
        let _ = write!(out, "<text class=\"e\" x=\"{right}\" y=\"{under}\">{}</text>", number(steps.1));
        let _ = write!(out, "<text x=\"{}\" y=\"{under}\">last</text></svg></figure>\n", width - 54.0);
        out
    }
}

/// The shade of a value: 0 for none, then equal parts of the way to the highest.
fn shade_of(value: f64, high: f64) -> usize {
    if value <= 0.0 || high <= 0.0 {
        return 0;
    }
    ((value / high * (SHADES - 1) as f64).ceil() as usize).clamp(1, SHADES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heat_is_darkest_where_it_is_highest() {
        let row = |name: &str, top: f64| {
            (
                name.to_string(),
                name.to_string(),
                (0..500).map(|i| (i as f64, top * i as f64 / 499.0)).collect(),
            )
        };
        let heat = Heat { unit: "%".into(), rows: vec![row("calm", 1.0), row("<wild>", 8.0)] };
        let html = heat.html("Oscillation");
        let (calm, wild) = html.split_once("&lt;wild&gt;: last 8 %").unwrap();
        assert!(wild.contains("<path class=\"h8\"") && !calm.contains("<path class=\"h2\""));
        assert_eq!((shade_of(0.0, 8.0), shade_of(0.01, 8.0), shade_of(8.0, 8.0)), (0, 1, 8));
        assert!(Heat::default().html("none").is_empty());
    }
}
