//! Hugging Face's `preprocessor_config.json`, read and written.

use super::preprocess::LARGEST;
use super::{Filter, Preprocess, Resize};
use crate::{Error, Result};
use serde_json::{json, Map, Value};
use std::path::{Path, PathBuf};

/// The name of the file.
const FILE: &str = "preprocessor_config.json";

/// A `preprocessor_config.json`, read key by key; a null is as good as nothing.
struct Config {
    path: PathBuf,
    map: Map<String, Value>,
}

impl Config {
    fn bad<T>(&self, key: &str, expected: &str) -> Result<T> {
        let found = self.map.get(key).map_or("nothing".to_string(), Value::to_string);
        Err(Error::input(&self.path, format!("{key} is {found}, expected {expected}")))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => self.bad(key, "true or false"),
        }
    }

    /// A number within what an f32 can hold.
    fn number(&self, key: &str, value: &Value) -> Result<f32> {
        let number = value.as_f64().map(|v| v as f32).filter(|v| v.is_finite());
        number.map_or_else(|| self.bad(key, "numbers"), Ok)
    }

    /// One number for each channel; one alone is for all.
    fn per_channel(&self, key: &str, channels: usize) -> Result<Vec<f32>> {
        let values = match self.get(key) {
            None => return Ok(vec![0.5; channels]),
            Some(Value::Array(values)) => {
                values.iter().map(|v| self.number(key, v)).collect::<Result<_>>()?
            }
            Some(value) => vec![self.number(key, value)?],
        };
        match values.len() {
            1 => Ok(vec![values[0]; channels]),
            n if n == channels => Ok(values),
            _ => self.bad(key, &format!("1 or {channels} numbers, one a channel")),
        }
    }

    fn side(&self, key: &str, value: Option<&Value>) -> Result<usize> {
        match value.and_then(Value::as_u64) {
            Some(side) if (1..=LARGEST).contains(&side) => Ok(side as usize),
            _ => self.bad(
                key,
                "pixels, {\"height\": …, \"width\": …} or {\"shortest_edge\": …}, each from 1 to 16384",
            ),
        }
    }

    fn resize(&self) -> Result<Resize> {
        if !self.flag("do_resize", true)? {
            return Ok(Resize::None);
        }
        let crops = self.flag("do_center_crop", false)?;
        let Some(size) = self.get("size") else { return Ok(Resize::Exact) };
        let Some(map) = size.as_object() else {
            // A bare number is a square, except where the center is cropped out of what is larger.
            let side = self.side("size", Some(size))?;
            return Ok(if crops { Resize::ShortestEdge(side) } else { Resize::Exact });
        };
        let key = |key: &str| map.get(key).filter(|v| !v.is_null());
        if let Some(edge) = key("shortest_edge") {
            return Ok(Resize::ShortestEdge(self.side("size", Some(edge))?));
        }
        let (height, width) = (self.side("size", key("height"))?, self.side("size", key("width"))?);
        Ok(if crops { Resize::Through(height, width) } else { Resize::Exact })
    }
}

impl Preprocess {
    /// Reads `preprocessor_config.json` in `dir`, or gives none where there is no such file.
    ///
    /// `height`, `width` and `channels` are the model's and win over the sizes in the file. A
    /// missing mean or std is 0.5, as in Hugging Face's ViT. Errs where the file is not JSON, a key
    /// that is used has the wrong type or count, or a std is not positive; unknown keys are ignored.
    pub fn load(dir: &Path, height: usize, width: usize, channels: usize) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(path, e)),
        };
        let value: Value =
            serde_json::from_str(&text).map_err(|e| Error::input(&path, format!("not JSON: {e}")))?;
        let Value::Object(map) = value else {
            return Err(Error::input(&path, "not a JSON object"));
        };
        let config = Config { path, map };
        let resize = config.resize()?;
        if config.get("crop_size").is_some_and(|v| !(v.is_u64() || v.is_object())) {
            return config.bad("crop_size", "pixels or {\"height\": …, \"width\": …}");
        }
        let filter = match config.get("resample").map(Value::as_u64) {
            None | Some(Some(2)) => Filter::Bilinear,
            Some(Some(0)) => Filter::Nearest,
            Some(Some(1)) => Filter::Lanczos,
            Some(Some(3)) => Filter::Bicubic,
            Some(_) => return config.bad("resample", "0 nearest, 1 lanczos, 2 bilinear or 3 bicubic"),
        };
        let rescale = match config.get("rescale_factor") {
            _ if !config.flag("do_rescale", true)? => 1.0,
            None => 1.0 / 255.0,
            Some(value) => config.number("rescale_factor", value)?,
        };
        let (mean, std) = match config.flag("do_normalize", true)? {
            true => (config.per_channel("image_mean", channels)?, config.per_channel("image_std", channels)?),
            false => (vec![0.0; channels], vec![1.0; channels]),
        };
        if std.iter().any(|s| *s <= 0.0) {
            return config.bad("image_std", "positive numbers");
        }
        Ok(Some(Preprocess { height, width, channels, mean, std, rescale, resize, filter }))
    }

    /// A `preprocessor_config.json` that Hugging Face and [`Preprocess::load`] read back.
    ///
    /// The processor named in it is ViT's, or DeiT's or CLIP's where the center is cropped, which
    /// ViT's does not do.
    pub fn to_json(&self) -> Value {
        // Through its shortest text: 0.485 as f32 would else be written 0.48500001430511475.
        let short = |v: f32| v.to_string().parse::<f64>().unwrap_or(f64::from(v));
        let list = |values: &[f32]| values.iter().map(|&v| short(v)).collect::<Vec<f64>>();
        let factor = if self.rescale == 1.0 / 255.0 { 1.0 / 255.0 } else { short(self.rescale) };
        let target = json!({ "height": self.height, "width": self.width });
        let (processor, size) = match self.resize {
            Resize::None | Resize::Exact => ("ViTImageProcessor", target.clone()),
            Resize::ShortestEdge(edge) => ("CLIPImageProcessor", json!({ "shortest_edge": edge })),
            Resize::Through(height, width) => {
                ("DeiTImageProcessor", json!({ "height": height, "width": width }))
            }
        };
        let mut out = json!({
            "image_processor_type": processor,
            "do_convert_rgb": if self.channels == 3 { Value::Bool(true) } else { Value::Null },
            "do_resize": self.resize != Resize::None,
            "size": size,
            "resample": match self.filter {
                Filter::Nearest => 0,
                Filter::Lanczos => 1,
                Filter::Bilinear => 2,
                Filter::Bicubic => 3,
            },
            "do_rescale": true,
            "rescale_factor": factor,
            "do_normalize": true,
            "image_mean": list(&self.mean),
            "image_std": list(&self.std),
        });
        if matches!(self.resize, Resize::ShortestEdge(_) | Resize::Through(..)) {
            out["do_center_crop"] = true.into();
            out["crop_size"] = target;
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Option<Preprocess>> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), text).unwrap();
        Preprocess::load(dir.path(), 32, 48, 3)
    }

    fn good(text: &str) -> Preprocess {
        load(text).unwrap().unwrap()
    }

    #[test]
    fn without_a_file_there_is_none_and_an_empty_one_is_the_default() {
        assert_eq!(Preprocess::load(Path::new("/nowhere"), 8, 8, 1).unwrap(), None);
        assert_eq!(good("{}"), Preprocess::default_for(32, 48, 3));
        assert_eq!(good(r#"{"size": null, "image_mean": null, "what": [1]}"#), good("{}"));
    }

    #[test]
    fn sizes_in_all_their_spellings() {
        assert_eq!(good(r#"{"size": 224}"#).resize, Resize::Exact);
        assert_eq!(good(r#"{"size": {"height": 32, "width": 32}}"#).resize, Resize::Exact);
        assert_eq!(good(r#"{"size": {"shortest_edge": 36}}"#).resize, Resize::ShortestEdge(36));
        let crop = r#""do_center_crop": true, "crop_size": 224"#;
        assert_eq!(good(&format!(r#"{{"size": 256, {crop}}}"#)).resize, Resize::ShortestEdge(256));
        let deit = format!(r#"{{"size": {{"height": 256, "width": 250}}, {crop}}}"#);
        assert_eq!(good(&deit).resize, Resize::Through(256, 250));
        assert_eq!(good(r#"{"do_resize": false, "size": 3}"#).resize, Resize::None);
        // The model's size wins.
        let p = good(r#"{"size": 224}"#);
        assert_eq!((p.height, p.width), (32, 48));
    }

    #[test]
    fn numbers() {
        let p = good(
            r#"{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.25], "rescale_factor": 0.5, "resample": 3}"#,
        );
        assert_eq!((p.mean, p.std, p.rescale), (vec![0.1, 0.2, 0.3], vec![0.25; 3], 0.5));
        assert_eq!(p.filter, Filter::Bicubic);
        let off = good(r#"{"do_normalize": false, "do_rescale": false, "image_std": [0], "resample": 1}"#);
        assert_eq!((off.mean, off.std, off.rescale), (vec![0.0; 3], vec![1.0; 3], 1.0));
        assert_eq!(off.filter, Filter::Lanczos);
    }

    #[test]
    fn wrong_values_are_named_by_their_key() {
        for (text, key) in [
            (r#"{"size": "big"}"#, "size"),
            (r#"{"size": 0}"#, "size"),
            (r#"{"size": {"height": 3}}"#, "size"),
            (r#"{"size": {"shortest_edge": -1}}"#, "size"),
            (r#"{"size": 99999}"#, "size"),
            (r#"{"crop_size": "x"}"#, "crop_size"),
            (r#"{"resample": 7}"#, "resample"),
            (r#"{"resample": "bicubic"}"#, "resample"),
            (r#"{"do_resize": 1}"#, "do_resize"),
            (r#"{"do_center_crop": "yes"}"#, "do_center_crop"),
            (r#"{"do_normalize": []}"#, "do_normalize"),
            (r#"{"do_rescale": 0}"#, "do_rescale"),
            (r#"{"rescale_factor": "1/255"}"#, "rescale_factor"),
            (r#"{"image_mean": [0.5, 0.5]}"#, "image_mean"),
            (r#"{"image_mean": ["a"]}"#, "image_mean"),
            (r#"{"image_std": [0.5, 0.5, 0]}"#, "image_std"),
            (r#"{"image_std": 1e60}"#, "image_std"),
            (r#"{"image_std": 1e-60}"#, "image_std"),
            ("[]", "object"),
            ("{", "JSON"),
        ] {
            let error = load(text).unwrap_err();
            let shown = error.to_string();
            assert_eq!(error.exit_code(), 4);
            assert!(shown.contains(FILE) && shown.contains(key), "{text}: {shown}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut p = Preprocess::default_for(32, 48, 3);
        p.mean = vec![0.485, 0.456, 0.406];
        for resize in [Resize::None, Resize::Exact, Resize::ShortestEdge(40), Resize::Through(40, 50)] {
            for filter in [Filter::Nearest, Filter::Bilinear, Filter::Bicubic, Filter::Lanczos] {
                (p.resize, p.filter) = (resize, filter);
                assert_eq!(good(&p.to_json().to_string()), p);
            }
        }
        p.resize = Resize::Exact;
        let json = p.to_json();
        assert_eq!(json["image_processor_type"], "ViTImageProcessor");
        assert_eq!(json["image_mean"].to_string(), "[0.485,0.456,0.406]");
        assert_eq!(json["rescale_factor"], 1.0 / 255.0);
    }
}
