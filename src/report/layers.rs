//! What a line of split `layers` says of each quantized weight.

use serde_json::Value;

/// One weight on a line of split `layers`. What a line does not say, or says as null, is absent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layer {
    /// The weight's checkpoint name.
    pub name: String,
    /// Bits a code.
    pub bits: Option<f64>,
    /// How many codes it has.
    pub codes: Option<f64>,
    /// Every single number but `bits` and `codes`, by its key: `oscillation` and `frozen` in percent,
    /// `flip_rate` and `grad_flip_rate` as shares, `osc_ema_mean`, `entropy` in bits.
    pub figures: Vec<(String, f64)>,
    /// Share of weights within a distance of their nearest threshold, by the distance in steps.
    pub near: Vec<(String, f64)>,
    /// The rows whose scales are given.
    pub scale_rows: Vec<u64>,
    /// The scales of those rows.
    pub scales: Vec<f64>,
    /// Share of codes at each level, the lowest first.
    pub levels: Vec<f64>,
    /// Share of weights by the distance to their nearest threshold, in equal bins of 0 to 0.5 steps.
    pub distance: Vec<f64>,
}

impl Layer {
    /// Reads one entry of `layers`; whatever is not as expected is left out.
    pub fn read(value: &Value) -> Self {
        let number = |key: &str| value.get(key).and_then(Value::as_f64);
        let list =
            |key: &str| value.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let numbers = |key: &str| list(key).iter().map(|v| v.as_f64().unwrap_or(0.0)).collect();
        let named = |value: Option<&Value>| -> Vec<(String, f64)> {
            let entries = value.and_then(Value::as_object).into_iter().flatten();
            entries.filter_map(|(key, v)| Some((key.clone(), v.as_f64()?))).collect()
        };
        let mut figures = named(Some(value));
        figures.retain(|(key, _)| key != "bits" && key != "codes");
        Layer {
            name: value.get("name").and_then(Value::as_str).unwrap_or("?").to_string(),
            bits: number("bits"),
            codes: number("codes"),
            figures,
            near: named(value.get("near_threshold")),
            scale_rows: list("scale_rows").iter().filter_map(Value::as_u64).collect(),
            scales: numbers("scales"),
            levels: numbers("levels"),
            distance: numbers("distance"),
        }
    }

    /// A single number by its key.
    pub fn figure(&self, key: &str) -> Option<f64> {
        self.figures.iter().find(|(k, _)| k == key).map(|(_, v)| *v)
    }

    /// The share of weights within `distance` steps (as the line writes it) of a threshold.
    pub fn near(&self, distance: &str) -> Option<f64> {
        self.near.iter().find(|(d, _)| d == distance).map(|(_, v)| *v)
    }
}

/// The last line of split `layers` among lines of metrics: its step and its entries as they stand.
pub fn last_line(metrics: &str) -> Option<(u64, Vec<Value>)> {
    // Only lines that can be it are parsed: a run's metrics are long.
    for line in metrics.lines().rev().filter(|line| line.contains("\"layers\"")) {
        let Ok(mut value) = serde_json::from_str::<Value>(line) else { continue };
        if value.get("split").and_then(Value::as_str) == Some("layers") {
            let step = value.get("step").and_then(Value::as_u64).unwrap_or(0);
            if let Some(Value::Array(layers)) = value.get_mut("layers").map(Value::take) {
                return Some((step, layers));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nulls_and_strangers_do_no_harm() {
        let layer = Layer::read(&json!({
            "name": "w", "bits": 2, "codes": 8, "oscillation": 3.5, "frozen": null, "levels": [0.5, null],
            "near_threshold": {"0.005": 0.25, "0.01": null}, "scale_rows": [0, 7], "scales": [0.1, 0.2],
            "distance": "none"
        }));
        assert_eq!((layer.bits, layer.codes), (Some(2.0), Some(8.0)));
        assert_eq!(layer.figures, [("oscillation".to_string(), 3.5)]);
        assert_eq!(
            (layer.near("0.005"), layer.near("0.01"), layer.figure("frozen")),
            (Some(0.25), None, None)
        );
        assert_eq!((layer.levels, layer.distance), (vec![0.5, 0.0], vec![]));
        assert_eq!(Layer::read(&json!(3)).name, "?");
    }

    #[test]
    fn the_last_whole_line_counts() {
        let text = "{\"split\":\"layers\",\"step\":1,\"layers\":[1]}\n{\"split\":\"layers\",\"step\":2,\"layers\":[2]}\n\
                    {\"split\":\"train\",\"step\":3}\n{\"split\":\"layers\",\"step\":4,\"lay";
        assert_eq!(last_line(text), Some((2, vec![json!(2)])));
        assert_eq!(last_line("{\"split\":\"train\"}"), None);
    }
}
