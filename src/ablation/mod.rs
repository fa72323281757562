//! Ablations: variants of one recipe, at several widths, over several seeds, all else equal.
//!
//! A recipe with an `[ablation]` table says which. Each run is a folder of its own beneath that of the
//! ablation: what is finished is kept and what was cut short goes on, so that a sweep can run in pieces,
//! and in several processes whose parts differ.

mod picture;
mod trade;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Device;
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use crate::recipe::{put, set, ModelConfig, Recipe};
use crate::train::Progress;
use crate::{continual, files, language, quantize, Error, Result};

/// `[ablation]` in a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ablation {
    /// Bits of weights and activations inside the blocks; none where nothing is quantized.
    #[serde(default)]
    pub bits: Vec<u8>,
    /// Seeds of each variant, counted from that of the recipe.
    pub seeds: u64,
    /// The variants, in the order of the table.
    #[serde(default)]
    pub variant: Vec<Variant>,
    /// Variants by the values of some keys, every value of one with every value of the others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub grid: Vec<Grid>,
}

/// Variants that differ in the values of a few keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grid {
    /// What they are called together.
    pub name: String,
    /// What all of them change, as `--set` does.
    #[serde(default)]
    pub set: Vec<String>,
    /// Keys and their values, as `--set` writes them.
    pub over: BTreeMap<String, Vec<String>>,
}

impl Grid {
    /// Every combination, the keys in alphabetical order, the last one's values next to one another.
    fn variants(&self) -> Vec<Variant> {
        let mut all = vec![(self.name.clone(), self.set.clone())];
        for (key, values) in &self.over {
            let short = key.rsplit('.').next().unwrap_or(key);
            let with = |(name, set): &(String, Vec<String>)| -> Vec<(String, Vec<String>)> {
                let one = |value: &String| {
                    let mut set = set.clone();
                    set.push(format!("{key}={value}"));
                    (format!("{name} {short} {value}"), set)
                };
                values.iter().map(one).collect()
            };
            all = all.iter().flat_map(with).collect();
        }
        let family = Some(self.name.clone());
        all.into_iter().map(|(name, set)| Variant { name, set, family: family.clone() }).collect()
    }
}

/// A variant of the recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// Its name in the table.
    pub name: String,
    /// What it changes, as `--set` does.
    pub set: Vec<String>,
    /// The grid that it is of.
    #[serde(skip)]
    pub family: Option<String>,
}

/// One run of an ablation.
#[derive(Clone, Debug)]
pub struct Cell {
    /// The variant's name.
    pub variant: String,
    /// Bits of weights and activations, where they are quantized.
    pub bits: Option<u8>,
    /// The seed.
    pub seed: u64,
    /// The run's recipe.
    pub recipe: Recipe,
    /// The run's folder.
    pub dir: PathBuf,
}

/// The figures of the finished runs of one variant at one width.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The variant's name.
    pub variant: String,
    /// Bits of weights and activations.
    pub bits: u8,
    /// Top-1 of the packed model in percent, one for each finished seed.
    pub top1: Vec<f64>,
    /// Percent of the quantized weights that oscillate at the end, likewise.
    pub oscillation: Vec<f64>,
    /// Percent of them that annealing held still at the end, likewise.
    pub frozen: Vec<f64>,
    /// The folders of these runs.
    #[serde(skip)]
    pub dirs: Vec<PathBuf>,
}

/// The letters and digits of a name, lower-case, with single hyphens between them.
fn slug(name: &str) -> String {
    let parts = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|part| !part.is_empty());
    parts.collect::<Vec<_>>().join("-").to_ascii_lowercase()
}

/// Takes `[ablation]` out of a recipe's table; one without is an error.
pub fn split(table: &mut toml::Table) -> Result<Ablation> {
    let found = table.remove("ablation").ok_or_else(|| {
        Error::usage("ablation: the recipe has no such table, expected bits, seeds, variants")
    })?;
    let mut ablation = Ablation::deserialize(found)
        .map_err(|e| Error::usage(format!("ablation: {}", e.message().replace('\n', " "))))?;
    let grids: Vec<Variant> = ablation.grid.drain(..).flat_map(|grid| grid.variants()).collect();
    ablation.variant.extend(grids);
    let widths = table.contains_key("transform");
    if ablation.bits.is_empty() == widths {
        let (found, expected) = if widths { ("none", "at least one") } else { ("some", "none") };
        return Err(Error::usage(format!(
            "ablation.bits: found {found}, expected {expected}: they are those of [[transform]]"
        )));
    }
    if !(1..=1000).contains(&ablation.seeds) || ablation.variant.is_empty() {
        return Err(Error::usage("ablation: expected 1 to 1000 seeds and at least one variant or grid"));
    }
    let mut names: Vec<String> = ablation.variant.iter().map(|v| slug(&v.name)).collect();
    names.sort();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::usage(format!(
            "ablation.variant: found {} twice, expected one folder each",
            pair[0]
        )));
    }
    Ok(ablation)
}

impl Ablation {
    /// Every run of the ablation of `table` beneath `dir`, seed by seed, so that a sweep that is cut short
    /// has whole rows.
    pub fn cells(&self, table: &toml::Table, dir: &Path) -> Result<Vec<Cell>> {
        let first = table.get("seed").and_then(toml::Value::as_integer).unwrap_or(0).max(0) as u64;
        let mut cells = Vec::new();
        let widths: Vec<Option<u8>> = match self.bits.is_empty() {
            true => vec![None],
            false => self.bits.iter().copied().map(Some).collect(),
        };
        for bits in widths {
            for seed in first..first + self.seeds {
                for variant in &self.variant {
                    let mut table = table.clone();
                    let mut values = vec![("seed", i64::try_from(seed).unwrap_or(i64::MAX))];
                    if let Some(bits) = bits {
                        values.push(("transform.0.bits", i64::from(bits)));
                        values.push(("activation.bits", i64::from(bits)));
                    }
                    for (key, value) in values {
                        put(&mut table, key, toml::Value::Integer(value))
                            .map_err(|what| Error::usage(format!("{key}: {what}")))?;
                    }
                    for assignment in &variant.set {
                        set(&mut table, assignment)?;
                    }
                    let recipe = Recipe::resolve(table)
                        .map_err(|e| Error::usage(format!("ablation.variant {}: {e}", variant.name)))?;
                    let width = bits.map(|bits| format!("w{bits}a{bits}-")).unwrap_or_default();
                    let dir = dir.join(format!("{width}{}-s{seed}", slug(&variant.name)));
                    cells.push(Cell { variant: variant.name.clone(), bits, seed, recipe, dir });
                }
            }
        }
        Ok(cells)
    }

    /// What the sweep has shown so far.
    pub fn table(&self, cells: &[Cell]) -> Result<Table> {
        match self.bits.is_empty() {
            false => self.rows(cells).map(Table::Widths),
            true => trade::rows(self, cells).map(Table::Trade),
        }
    }

    /// The rows of the table of widths: the figures of those of `cells` that are finished.
    fn rows(&self, cells: &[Cell]) -> Result<Vec<Row>> {
        let mut rows: Vec<Row> = Vec::new();
        for &bits in &self.bits {
            for variant in &self.variant {
                let (variant, dirs) = (variant.name.clone(), Vec::new());
                let mut row = Row { variant, bits, top1: vec![], oscillation: vec![], frozen: vec![], dirs };
                for cell in cells.iter().filter(|c| c.bits == Some(bits) && c.variant == row.variant) {
                    let Some(summary) = quantize::finished(&cell.dir)? else { continue };
                    let number = |key: &str| {
                        let path = cell.dir.join("summary.json");
                        let value = summary.get(key).and_then(Value::as_f64);
                        value.ok_or_else(|| Error::input(path, format!("{key}: found no number")))
                    };
                    row.top1.push(number("q_top1")?);
                    row.oscillation.push(number("oscillation")?);
                    row.frozen.push(number("frozen")?);
                    row.dirs.push(cell.dir.clone());
                }
                rows.push(row);
            }
        }
        Ok(rows)
    }
}

/// Runs a cell to its end, from where it stands.
pub fn run(cell: &Cell, device: &Device, progress: &dyn Progress) -> Result<()> {
    let written = cell.dir.join("recipe.toml");
    if written.exists() {
        let text = files::read_text(&written)?;
        let table =
            text.parse().map_err(|e: toml::de::Error| Error::input(&written, e.message().to_string()))?;
        if Recipe::resolve(table)? != cell.recipe {
            return Err(Error::usage(format!(
                "{}: it was begun with another recipe; name another --out",
                cell.dir.display()
            )));
        }
        if quantize::finished(&cell.dir)?.is_some() || diverged(&cell.dir) {
            return Ok(());
        }
    } else {
        let staging = files::Staging::new(&cell.dir)?;
        files::write_bytes(&staging.path().join("recipe.toml"), cell.recipe.to_toml()?.as_bytes())?;
        staging.commit()?;
    }
    let width = cell.bits.map(|bits| format!(" at {bits} bits")).unwrap_or_default();
    progress.note(&format!("{}{width}, seed {}", cell.variant, cell.seed));
    let done = match (&cell.recipe.continual, &cell.recipe.model) {
        (Some(_), _) => continual::run(&cell.recipe, &cell.dir, device, progress),
        (None, ModelConfig::Llama(_)) => language::run(&cell.recipe, &cell.dir, device, progress),
        _ => quantize::run(&cell.recipe, &cell.dir, device, progress),
    };
    if !matches!(done, Ok(_) | Err(Error::Stopped { .. })) && !cell.dir.join("checkpoints").exists() {
        // It failed before there was anything to keep: what went wrong is the news, not that cleaning up did.
        let _ = files::discard(&cell.dir);
    }
    match done {
        // One setting that does not train is a figure of the sweep, not its end.
        Err(Error::NotFinite(message)) => {
            progress.note(&format!("{}: {message}", cell.dir.display()));
            std::fs::create_dir_all(&cell.dir).map_err(|e| Error::io(&cell.dir, e))?;
            files::write_bytes(&cell.dir.join(DIVERGED), message.as_bytes())
        }
        done => done.map(|_| ()),
    }
}

/// The file of a run whose loss or gradient was not finite.
const DIVERGED: &str = "diverged.txt";

fn diverged(dir: &Path) -> bool {
    dir.join(DIVERGED).exists()
}

/// Mean, lowest and highest.
fn spread(values: &[f64]) -> Option<(f64, f64, f64)> {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let low = values.iter().copied().reduce(f64::min)?;
    Some((mean, low, values.iter().copied().reduce(f64::max)?))
}

/// What a sweep has shown.
pub enum Table {
    /// Of quantizers at several widths.
    Widths(Vec<Row>),
    /// Of what is learned and what is forgotten.
    Trade(Vec<trade::Trade>),
}

impl Table {
    /// The table in Markdown.
    pub fn markdown(&self) -> String {
        match self {
            Table::Widths(rows) => markdown(rows),
            Table::Trade(rows) => trade::markdown(rows),
        }
    }

    /// The picture; nothing where there are no finished runs.
    fn svg(&self) -> Result<Option<String>> {
        match self {
            Table::Widths(rows) => picture::svg(rows),
            Table::Trade(rows) => Ok(trade::svg(rows)),
        }
    }

    fn rows(&self) -> Value {
        match self {
            Table::Widths(rows) => json!(rows),
            Table::Trade(rows) => json!(rows),
        }
    }
}

/// The table of an ablation in Markdown: mean and range over the seeds that are finished.
fn markdown(rows: &[Row]) -> String {
    let mut text = String::from(
        "| bits | variant | top-1, mean (lowest to highest) | oscillating weights, mean (lowest to highest) | frozen | seeds |\n\
         | --- | --- | --- | --- | --- | --- |\n",
    );
    for row in rows {
        let name = row.variant.replace('|', "\\|");
        text += &match (spread(&row.top1), spread(&row.oscillation), spread(&row.frozen)) {
            (Some(top), Some(osc), Some(frozen)) => format!(
                "| {} | {name} | {:.2} % ({:.2} to {:.2}) | {:.3} % ({:.3} to {:.3}) | {:.1} % | {} |\n",
                row.bits,
                top.0,
                top.1,
                top.2,
                osc.0,
                osc.1,
                osc.2,
                frozen.0,
                row.top1.len()
            ),
            _ => format!("| {} | {name} | not run | not run | not run | 0 |\n", row.bits),
        };
    }
    text
}

/// Writes `table.md`, `ablation.svg` and `ablation.json` into `dir`, and gives what the last holds.
pub fn write(dir: &Path, table: &Table) -> Result<Value> {
    files::write_bytes(&dir.join("table.md"), table.markdown().as_bytes())?;
    if let Some(picture) = table.svg()? {
        files::write_bytes(&dir.join("ablation.svg"), picture.as_bytes())?;
    }
    let value = json!({ "command": "ablate", "version": env!("CARGO_PKG_VERSION"), "commit": env!("QTUNE_COMMIT"), "rows": table.rows() });
    let text = serde_json::to_vec_pretty(&value).map_err(|e| Error::Run(format!("ablation.json: {e}")))?;
    files::write_bytes(&dir.join("ablation.json"), &text)?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> toml::Table {
        Recipe::table("ablation-ofq").unwrap()
    }

    #[test]
    fn cells_differ_by_what_the_table_says_alone() {
        let mut table = table();
        let ablation = split(&mut table).unwrap();
        let cells = ablation.cells(&table, Path::new("out")).unwrap();
        assert_eq!(cells.len(), 3 * 3 * 7);
        let of = |variant: &str| cells.iter().find(|c| c.variant == variant).unwrap();
        let (lsq, all) = (of("LSQ"), of("OFQ, CGA as in the paper"));
        assert_eq!(lsq.dir, Path::new("out/w2a2-lsq-s0"));
        assert_eq!(all.dir, Path::new("out/w2a2-ofq-cga-as-in-the-paper-s0"));
        assert!(lsq.recipe.qkr.is_none() && all.recipe.qkr.is_some());
        let lengths = |c: &Cell| c.recipe.phase.iter().map(|p| p.steps).collect::<Vec<_>>();
        assert_eq!(lengths(lsq), lengths(all));
        let wide = cells.iter().find(|c| c.bits == Some(4)).unwrap();
        assert_eq!((wide.recipe.transform[0].bits, wide.recipe.activation.bits), (4, 4));
    }

    #[test]
    fn grids_are_every_combination() {
        let over =
            |key: &str, values: &[&str]| (key.to_string(), values.iter().map(|v| v.to_string()).collect());
        let grid = Grid {
            name: "g".into(),
            set: vec!["seed=1".into()],
            over: [over("phase.0.lr", &["0.1", "0.2"]), over("train.clip", &["0", "1"])]
                .into_iter()
                .collect(),
        };
        let variants = grid.variants();
        let names: Vec<&str> = variants.iter().map(|v| v.name.as_str()).collect();
        assert_eq!(names, ["g lr 0.1 clip 0", "g lr 0.1 clip 1", "g lr 0.2 clip 0", "g lr 0.2 clip 1"]);
        assert_eq!(variants[1].set, ["seed=1", "phase.0.lr=0.1", "train.clip=1"]);
        assert_eq!(variants[1].family.as_deref(), Some("g"));
    }

    #[test]
    fn the_table_by_hand() {
        let row = |variant: &str, top1: &[f64]| Row {
            variant: variant.into(),
            bits: 2,
            top1: top1.to_vec(),
            oscillation: top1.iter().map(|t| t / 100.0).collect(),
            frozen: vec![0.0; top1.len()],
            dirs: vec![],
        };
        let text = markdown(&[row("a|b", &[80.0, 82.0]), row("c", &[])]);
        assert!(
            text.contains("| 2 | a\\|b | 81.00 % (80.00 to 82.00) | 0.810 % (0.800 to 0.820) | 0.0 % | 2 |")
        );
        assert!(text.contains("| 2 | c | not run |"));
    }

    #[test]
    fn a_finished_run_of_another_recipe_is_not_taken_for_this_one() {
        let mut table = table();
        let ablation = split(&mut table).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let cell = ablation.cells(&table, dir.path()).unwrap().remove(0);
        std::fs::create_dir_all(&cell.dir).unwrap();
        let write = |recipe: &Recipe| {
            std::fs::write(cell.dir.join("recipe.toml"), recipe.to_toml().unwrap()).unwrap();
        };
        std::fs::write(cell.dir.join("summary.json"), "{}").unwrap();
        write(&cell.recipe);
        run(&cell, &Device::Cpu, &crate::train::Quiet).unwrap();
        let mut other = cell.recipe.clone();
        other.data.limit_train = Some(7);
        write(&other);
        let error = run(&cell, &Device::Cpu, &crate::train::Quiet).unwrap_err();
        assert!(error.to_string().contains("begun with another recipe"), "{error}");
    }

    #[test]
    fn a_recipe_without_the_table_and_twins_are_refused() {
        assert!(split(&mut Recipe::table("glyphs").unwrap())
            .unwrap_err()
            .to_string()
            .contains("no such table"));
        let mut table = table();
        put(&mut table, "ablation.variant.1.name", toml::Value::String("lsq!".into())).unwrap();
        assert!(split(&mut table).unwrap_err().to_string().contains("found lsq twice"));
    }
}
