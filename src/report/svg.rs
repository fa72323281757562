//! Small charts as inline SVG. Colours are classes, which the page's style sheet knows for light and
//! dark; names and units come in as they are and are escaped here.

use std::fmt::Write;

use super::series::{range, thin, Point};
use super::text::{escape, mark, number};

/// Points a curve of a large chart is thinned to.
const MOST: usize = 400;

/// A curve of a chart.
#[derive(Clone, Debug, Default)]
pub struct Line {
    /// Its name in the legend.
    pub name: String,
    /// Step and value, ordered by step.
    pub points: Vec<Point>,
    /// What is said of each point where the mouse rests on it; none: the points are not drawn.
    pub labels: Vec<String>,
    /// The number of its colour, from 0.
    pub colour: usize,
    /// Drawn faintly, without a place in the legend.
    pub faint: bool,
}

/// Curves over the steps of a run.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    /// What it shows.
    pub title: String,
    /// The unit of its values, empty where they have none.
    pub unit: String,
    /// A longer name, shown where the mouse rests on the title.
    pub hint: String,
    /// The curves, the first at the back.
    pub lines: Vec<Line>,
    /// Steps at which something begins, and its name.
    pub marks: Vec<(f64, String)>,
    /// A logarithmic axis, where all values are positive.
    pub log: bool,
    /// One of many: small, a mark at each end of its axes.
    pub small: bool,
    /// Points a curve is thinned to; 0: as many as a large chart takes.
    pub most: usize,
}

/// Size and margins in the units of the view box.
pub(super) struct Frame {
    pub(super) width: f64,
    pub(super) height: f64,
    pub(super) left: f64,
    pub(super) right: f64,
    pub(super) top: f64,
    pub(super) bottom: f64,
}

const LARGE: Frame = Frame { width: 560.0, height: 230.0, left: 52.0, right: 14.0, top: 18.0, bottom: 26.0 };
pub(super) const SMALL: Frame =
    Frame { width: 250.0, height: 110.0, left: 42.0, right: 8.0, top: 8.0, bottom: 18.0 };

/// An axis: values to positions.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
    from: f64,
    to: f64,
}

impl Axis {
    fn at(&self, value: f64) -> f64 {
        let share = match self.log {
            true => (value / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        self.from + (self.to - self.from) * share.clamp(-0.02, 1.02)
    }
}

/// Round numbers from `low` to `high`, about `wanted` of them, and how far apart they lie.
pub fn ticks(low: f64, high: f64, wanted: usize) -> (Vec<f64>, f64) {
    let raw = ((high - low) / wanted.max(1) as f64).max(f64::MIN_POSITIVE);
    let decade = 10f64.powf(raw.log10().floor());
    let apart = [1.0, 2.0, 5.0, 10.0].map(|m| m * decade).into_iter().find(|a| *a >= raw * 0.999);
    let apart = apart.unwrap_or(raw);
    let first = (low / apart - 1e-9).ceil() as i64;
    let last = (high / apart + 1e-9).floor() as i64;
    ((first..=last).map(|i| i as f64 * apart).collect(), apart)
}

/// Powers of ten from `low` to `high`, with their doubles and fives where there are few.
fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let decades = (high / low).log10();
    let every = (decades / 5.0).ceil().max(1.0) as i32;
    let between: &[f64] = if decades < 2.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let first = low.log10().floor() as i32;
    let exponents = (first..=high.log10().ceil() as i32).filter(|e| every == 1 || e.rem_euclid(every) == 0);
    let all = exponents.flat_map(|e| between.iter().map(move |m| m * 10f64.powi(e)));
    all.filter(|v| (low * 0.999..=high * 1.001).contains(v)).collect()
}

impl Chart {
    /// The chart as a `figure`; nothing where it is empty.
    pub fn html(&self) -> String {
        let mut out = String::new();
        let values = || self.lines.iter().flat_map(|line| &line.points);
        let (Some(steps), Some(span)) = (range(values().map(|p| p.0)), range(values().map(|p| p.1))) else {
            return out;
        };
        let frame = if self.small { SMALL } else { LARGE };
        let (x, y) = self.axes(&frame, steps, span);
        let class = if self.small { "chart small" } else { "chart" };
        let _ = write!(out, "<figure class=\"{class}\"><figcaption{}>", title_of(&self.hint));
        let _ = write!(out, "<b>{}</b>", escape(&self.title));
        if !self.unit.is_empty() {
            let _ = write!(out, " <span class=\"unit\">{}</span>", escape(&self.unit));
        }
        out += "<output></output></figcaption>";
        if !self.small {
            self.legend(&mut out);
        }
        let log = if y.log { " log" } else { "" };
        let _ = write!(
            out,
            "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\" data-x=\"{} {} {} {}\" data-y=\"{} {} {} {}{log}\">",
            frame.width,
            frame.height,
            escape(&self.title),
            x.low,
            x.high,
            x.from,
            x.to,
            y.low,
            y.high,
            y.from,
            y.to
        );
        self.grid(&mut out, &frame, &x, &y);
        for line in &self.lines {
            self.line(&mut out, line, &x, &y);
        }
        out += "</svg></figure>\n";
        out
    }

    fn axes(&self, frame: &Frame, steps: (f64, f64), span: (f64, f64)) -> (Axis, Axis) {
        let log = self.log && span.0 > 0.0 && span.1 / span.0 > 3.0;
        let (mut low, mut high) = span;
        if log {
            (low, high) = (low / 1.1, high * 1.1);
        } else {
            // Values that never change lie in the middle; what is never negative starts at 0 where 0 is near.
            let room = if high > low { 0.06 * (high - low) } else { high.abs().max(1e-9) * 0.5 };
            let near = low >= 0.0 && low < 0.5 * high;
            low = if near || low == 0.0 { 0.0 } else { low - room };
            high += room;
        }
        let last = if steps.1 > steps.0 { steps.1 } else { steps.0 + 1.0 };
        let x =
            Axis { low: steps.0, high: last, log: false, from: frame.left, to: frame.width - frame.right };
        (x, Axis { low, high, log, from: frame.height - frame.bottom, to: frame.top })
    }

    fn legend(&self, out: &mut String) {
        let named: Vec<&Line> = self.lines.iter().filter(|l| !l.faint && !l.points.is_empty()).collect();
        if named.len() < 2 {
            return;
        }
        *out += "<div class=\"legend\">";
        for line in named {
            let _ = write!(out, "<span class=\"c{}\"><i></i>{}</span>", line.colour % 8, escape(&line.name));
        }
        *out += "</div>";
    }

    fn grid(&self, out: &mut String, frame: &Frame, x: &Axis, y: &Axis) {
        let (left, right) = (x.from, x.to);
        let (values, apart) = match y.log {
            true => (log_ticks(y.low, y.high), 0.0),
            false => ticks(y.low, y.high, if self.small { 2 } else { 4 }),
        };
        *out += "<g class=\"axis\">";
        for value in values {
            let (at, text) = (y.at(value), mark(value, if y.log { value } else { apart }));
            let _ = write!(out, "<path d=\"M{left} {at:.1}H{right}\"/>");
            let _ =
                write!(out, "<text class=\"e\" x=\"{:.1}\" y=\"{:.1}\">{text}</text>", left - 6.0, at + 3.5);
        }
        let (steps, apart) = ticks(x.low, x.high, if self.small { 2 } else { 6 });
        for step in steps.into_iter().filter(|s| *s == s.round()) {
            let text = mark(step, apart.max(1.0));
            let bottom = frame.height - 5.0;
            let at = x.at(step);
            let anchor = if at > right - 12.0 { "e" } else { "m" };
            let _ = write!(out, "<text class=\"{anchor}\" x=\"{at:.1}\" y=\"{bottom}\">{text}</text>");
        }
        *out += "</g>";
        let mut free = f64::NEG_INFINITY;
        for (step, name) in self.marks.iter().filter(|(step, _)| (x.low..=x.high).contains(step)) {
            let at = x.at(*step);
            let _ = write!(out, "<g class=\"mark\"><title>{}</title>", escape(name));
            let _ = write!(out, "<path d=\"M{at:.1} {}V{}\"/>", y.to, y.from);
            // A name that would run into the one before it stays in the title.
            if !self.small && at >= free {
                let _ =
                    write!(out, "<text x=\"{:.1}\" y=\"{}\">{}</text>", at + 3.0, y.to - 5.0, escape(name));
                free = at + 8.0 + 6.0 * name.chars().count() as f64;
            }
            *out += "</g>";
        }
    }

    fn line(&self, out: &mut String, line: &Line, x: &Axis, y: &Axis) {
        let most = if self.most > 0 { self.most } else { MOST };
        // Points with labels are few, and each has its own.
        let labelled = line.labels.len() == line.points.len() && line.points.len() <= MOST;
        let points = if labelled { line.points.clone() } else { thin(&line.points, most) };
        let Some(last) = line.points.last() else { return };
        let faint = if line.faint { " faint" } else { "" };
        let _ =
            write!(out, "<g class=\"line c{}{faint}\" data-n=\"{}\">", line.colour % 8, escape(&line.name));
        let (low, high) = range(line.points.iter().map(|p| p.1)).unwrap_or_default();
        let _ = write!(
            out,
            "<title>{}: last {}, lowest {}, highest {}</title><path d=\"M",
            escape(&line.name),
            number(last.1),
            number(low),
            number(high)
        );
        for (i, point) in points.iter().enumerate() {
            let gap = if i == 0 { "" } else { " " };
            let _ = write!(out, "{gap}{} {}", place(x.at(point.0)), place(y.at(point.1)));
        }
        *out += "\"/>";
        let dots = points.iter().enumerate().filter(|_| labelled || points.len() == 1);
        for (i, point) in dots {
            let label = line.labels.get(i).map(String::as_str).unwrap_or_default();
            let label = format!("{} {} at step {} {label}", line.name, number(point.1), number(point.0));
            let (cx, cy) = (place(x.at(point.0)), place(y.at(point.1)));
            let _ = write!(
                out,
                "<circle cx=\"{cx}\" cy=\"{cy}\" r=\"3.5\"><title>{}</title></circle>",
                escape(label.trim())
            );
        }
        *out += "</g>";
    }
}

/// A position with one digit behind the point, none where it is 0.
pub(super) fn place(at: f64) -> f64 {
    (at * 10.0).round() / 10.0
}

/// A `title` attribute, where there is something to say.
pub(super) fn title_of(hint: &str) -> String {
    match hint.is_empty() {
        true => String::new(),
        false => format!(" title=\"{}\"", escape(hint)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 1.0, 4).0, [0.0, 0.5, 1.0]);
        assert_eq!(ticks(0.0, 100.0, 5).0, [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(ticks(-3.0, 7.0, 2).0, [0.0, 5.0]);
        assert_eq!(log_ticks(0.9, 120.0), [1.0, 10.0, 100.0]);
        assert_eq!(log_ticks(0.9, 6.0), [1.0, 2.0, 5.0]);
        let wide = log_ticks(1e-12, 1e12);
        assert!(wide.len() < 8, "{wide:?}");
    }

    #[test]
    fn a_chart_has_its_curve_its_legend_and_no_foreign_markup() {
        let line = |name: &str, colour| Line {
            name: name.into(),
            points: vec![(0.0, 1.0), (10.0, 3.0)],
            colour,
            ..Line::default()
        };
        let chart = Chart {
            title: "a<b".into(),
            lines: vec![line("one", 0), line("</svg>", 1)],
            marks: vec![(5.0, "\"phase\"".into())],
            ..Chart::default()
        };
        let html = chart.html();
        for part in ["a&lt;b", "<i></i>one", "&lt;/svg&gt;: last 3", "&quot;phase&quot;", "d=\"M52 "] {
            assert!(html.contains(part), "no {part:?} in {html}");
        }
        assert_eq!(html.matches("</svg>").count(), 1);
        assert!(Chart::default().html().is_empty());
        // One point, one value, zeros on a logarithmic axis: no division by nothing.
        for points in [vec![(3.0, 0.0)], vec![(0.0, 0.0), (1.0, 5.0)], vec![(1.0, -2.0), (2.0, -2.0)]] {
            let lines = vec![Line { points, ..Line::default() }];
            let html = Chart { lines, log: true, ..Chart::default() }.html();
            assert!(!html.contains("NaN") && !html.contains("inf"), "{html}");
        }
    }
}
