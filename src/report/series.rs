//! Curves as points: thinned, smoothed, and the range they span.

/// A point: step and value.
pub type Point = (f64, f64);

/// At most about `most` of `points`, which are ordered by step: of each of `most / 2` equal stretches of
/// the steps the lowest and the highest, so that no peak is lost; the first and the last always.
pub fn thin(points: &[Point], most: usize) -> Vec<Point> {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return Vec::new() };
    if points.len() <= most.max(2) {
        return points.to_vec();
    }
    let stretches = (most / 2).max(1);
    let width = (last.0 - first.0).max(f64::MIN_POSITIVE) / stretches as f64;
    let stretch = |point: &Point| (((point.0 - first.0) / width) as usize).min(stretches - 1);
    let mut keep = vec![0, points.len() - 1];
    let mut start = 0;
    while start < points.len() {
        let here = stretch(&points[start]);
        let (mut low, mut high, mut end) = (start, start, start);
        while end < points.len() && stretch(&points[end]) == here {
            low = if points[end].1 < points[low].1 { end } else { low };
            high = if points[end].1 > points[high].1 { end } else { high };
            end += 1;
        }
        keep.extend([low, high]);
        start = end;
    }
    keep.sort_unstable();
    keep.dedup();
    keep.into_iter().map(|i| points[i]).collect()
}

/// An exponential mean that has seen about the last thirtieth of the points, and whose start is not
/// drawn to 0.
pub fn smooth(points: &[Point]) -> Vec<Point> {
    let momentum = 1.0 / (points.len() as f64 / 30.0).max(1.0);
    let (mut mean, mut weight) = (0.0, 0.0);
    let step = |&(x, y): &Point| {
        mean += momentum * (y - mean);
        weight += momentum * (1.0 - weight);
        (x, mean / weight)
    };
    points.iter().map(step).collect()
}

/// Lowest and highest of some values; `None` where there are none.
pub fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|v| v.is_finite()).fold(None, |range, v| match range {
        None => Some((v, v)),
        Some((lo, hi)) => Some((f64::min(lo, v), f64::max(hi, v))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_the_ends_and_the_extremes() {
        let mut points: Vec<Point> = (0..10_000).map(|i| (i as f64, (i % 7) as f64)).collect();
        points[1234].1 = 99.0;
        points[8765].1 = -99.0;
        let thinned = thin(&points, 400);
        assert!(thinned.len() <= 402 && thinned.len() > 300, "{}", thinned.len());
        for kept in [points[0], points[9999], points[1234], points[8765]] {
            assert!(thinned.contains(&kept), "{kept:?}");
        }
        assert!(thinned.windows(2).all(|p| p[0].0 < p[1].0));
        assert_eq!(thin(&points[..50], 400), points[..50]);
        assert!(thin(&[], 400).is_empty());
        // All at one step: nothing to divide by.
        assert!(thin(&vec![(5.0, 1.0); 1000], 10).len() <= 10);
    }

    #[test]
    fn smoothing_by_hand() {
        let flat: Vec<Point> = (0..90).map(|i| (i as f64, 2.0)).collect();
        assert!(smooth(&flat).iter().all(|p| (p.1 - 2.0).abs() < 1e-12));
        // 60 points: momentum 1/2. 4, then (4/2 + 8) / 2 over a weight of 3/4.
        let mut two = vec![(0.0, 4.0), (1.0, 8.0)];
        two.extend((2..60).map(|i| (i as f64, 0.0)));
        let smoothed = smooth(&two);
        assert!((smoothed[0].1 - 4.0).abs() < 1e-12);
        assert!((smoothed[1].1 - 20.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn ranges_leave_out_what_is_not_finite() {
        assert_eq!(range([2.0, f64::NAN, -1.0, f64::INFINITY].into_iter()), Some((-1.0, 2.0)));
        assert_eq!(range(std::iter::empty()), None);
    }
}
