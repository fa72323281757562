//! The tasks of a run: their images under the labels of one model.

use std::sync::Arc;

use crate::data::{DataConfig, Dataset, HoldOut, Image, Source};
use crate::random::Random;
use crate::recipe::{ContinualConfig, HeadKind, Recipe, TaskConfig};
use crate::train::Heads;
use crate::weights::nearest;
use crate::{Error, Result};

/// One task.
#[derive(Clone)]
pub struct TaskData {
    /// Its name.
    pub name: String,
    /// Its training images, under the model's labels.
    pub train: Arc<dyn Source>,
    /// Its evaluation images, likewise.
    pub eval: Arc<dyn Source>,
}

/// All tasks.
#[derive(Clone)]
pub struct Tasks {
    /// In the order in which they are learned.
    pub list: Vec<TaskData>,
    /// The outputs of the model.
    pub classes: Vec<String>,
    /// The outputs of each task, where an image's task is known.
    pub heads: Option<Heads>,
    /// What is worth a line.
    pub notes: Vec<String>,
}

/// Images of another source: some of them, under other labels, their pixels in another order.
struct Part {
    inner: Arc<dyn Source>,
    /// The images, as indices into `inner`; none: all.
    indices: Option<Vec<u32>>,
    /// The new label of each label of `inner`; none: the same.
    relabel: Option<Vec<u32>>,
    /// What is added to it.
    offset: u32,
    /// The number of the order of the pixels.
    permute: Option<u64>,
}

impl Part {
    fn at(&self, index: usize) -> usize {
        self.indices.as_ref().map_or(index, |indices| indices[index] as usize)
    }
}

impl Source for Part {
    fn len(&self) -> usize {
        self.indices.as_ref().map_or(self.inner.len(), Vec::len)
    }

    fn label(&self, index: usize) -> u32 {
        let label = self.inner.label(self.at(index));
        self.offset + self.relabel.as_ref().map_or(label, |map| map[label as usize])
    }

    fn image(&self, index: usize) -> Result<Image> {
        let image = self.inner.image(self.at(index))?;
        let Some(number) = self.permute else { return Ok(image) };
        let pixels = image.width * image.height;
        let order = Random::new(number, "permuted pixels", &[pixels as u64]).permutation(pixels);
        let from = |&pixel: &u32| {
            let at = pixel as usize * image.channels;
            image.pixels[at..at + image.channels].iter().copied()
        };
        Ok(Image { pixels: order.iter().flat_map(from).collect(), ..image })
    }

    fn name(&self, index: usize) -> String {
        self.inner.name(self.at(index))
    }

    fn left_out(&self) -> Vec<String> {
        self.inner.left_out()
    }
}

/// Images of several sources, one source after another.
pub struct Joined {
    parts: Vec<(Arc<dyn Source>, Vec<u32>)>,
    /// Where each part begins.
    starts: Vec<usize>,
    len: usize,
}

impl Joined {
    /// Of each source the images with these indices.
    pub fn new(parts: Vec<(Arc<dyn Source>, Vec<u32>)>) -> Self {
        let mut len = 0;
        let mut starts = Vec::with_capacity(parts.len());
        for (_, indices) in &parts {
            starts.push(len);
            len += indices.len();
        }
        Joined { parts, starts, len }
    }

    fn at(&self, index: usize) -> (&Arc<dyn Source>, usize) {
        let part = self.starts.partition_point(|start| *start <= index) - 1;
        let (source, indices) = &self.parts[part];
        (source, indices[index - self.starts[part]] as usize)
    }
}

impl Source for Joined {
    fn len(&self) -> usize {
        self.len
    }

    fn label(&self, index: usize) -> u32 {
        let (source, index) = self.at(index);
        source.label(index)
    }

    fn image(&self, index: usize) -> Result<Image> {
        let (source, index) = self.at(index);
        source.image(index)
    }

    fn name(&self, index: usize) -> String {
        let (source, index) = self.at(index);
        source.name(index)
    }

    fn left_out(&self) -> Vec<String> {
        self.parts.iter().flat_map(|(source, _)| source.left_out()).collect()
    }
}

/// The images of `source` whose label is one of `picked`, under their place there.
fn picked(source: &Arc<dyn Source>, picked: &[usize], known: usize) -> Arc<dyn Source> {
    let mut map = vec![None; known];
    for (new, old) in picked.iter().enumerate() {
        map[*old] = Some(new as u32);
    }
    let indices = (0..source.len()).filter(|&i| map[source.label(i) as usize].is_some());
    Arc::new(Part {
        inner: source.clone(),
        indices: Some(indices.map(|i| i as u32).collect()),
        relabel: Some(map.into_iter().map(Option::unwrap_or_default).collect()),
        offset: 0,
        permute: None,
    })
}

/// A task's images under labels of its own.
fn open_one(recipe: &Recipe, continual: &ContinualConfig, i: usize, task: &TaskConfig) -> Result<Dataset> {
    let all = &recipe.data;
    let own = match &task.data {
        None => all.clone(),
        Some(own) => DataConfig {
            limit_train: own.limit_train.or(all.limit_train),
            limit_eval: own.limit_eval.or(all.limit_eval),
            strict: own.strict || all.strict,
            ..own.clone()
        },
    };
    let mut data = own.open(recipe.seed)?;
    if !task.classes.is_empty() {
        let mut places = Vec::with_capacity(task.classes.len());
        for class in &task.classes {
            let place = data.classes.iter().position(|known| known == class);
            places.push(place.ok_or_else(|| {
                let near = nearest(class, data.classes.iter().map(String::as_str));
                let hint = near.map(|near| format!(" (nearest: {near})")).unwrap_or_default();
                let known = data.classes.join(", ");
                Error::usage(format!(
                    "continual.task.{i}.classes: found {class:?}, expected of {known}{hint}"
                ))
            })?);
        }
        let known = data.classes.len();
        data.train = picked(&data.train, &places, known);
        data.eval = picked(&data.eval, &places, known);
        data.classes = task.classes.clone();
    }
    if let Some(held) = continual.validation {
        data = data.validated(HoldOut::Count(held))?;
    }
    if data.train.is_empty() || data.eval.is_empty() {
        let found = if data.train.is_empty() { "train" } else { "evaluate" };
        let path = own.path.unwrap_or_else(|| data.name.clone().into());
        return Err(Error::input(path, format!("task {}: found no images to {found} on", task.name)));
    }
    Ok(data)
}

/// Opens the tasks of a recipe.
pub fn open(recipe: &Recipe, continual: &ContinualConfig) -> Result<Tasks> {
    let mut sets = Vec::with_capacity(continual.task.len());
    for (i, task) in continual.task.iter().enumerate() {
        sets.push(open_one(recipe, continual, i, task)?);
    }
    let mut classes: Vec<String> = Vec::new();
    let (mut ranges, mut list, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    for (task, data) in continual.task.iter().zip(sets) {
        let offset = match continual.heads {
            HeadKind::Shared => 0,
            HeadKind::Class | HeadKind::Task => classes.len(),
        };
        for (label, class) in data.classes.iter().enumerate() {
            let again = classes.contains(class);
            match classes.get_mut(offset + label) {
                // Several tasks call the same output by different names.
                Some(known) if !known.split(" / ").any(|name| name == class) => {
                    *known = format!("{known} / {class}");
                }
                Some(_) => {}
                None if again => classes.push(format!("{class} of {}", task.name)),
                None => classes.push(class.clone()),
            }
        }
        ranges.push(offset..offset + data.classes.len());
        notes.extend(data.notes);
        let under = |inner: Arc<dyn Source>| -> Arc<dyn Source> {
            match (offset, task.permute) {
                (0, None) => inner,
                _ => {
                    let offset = offset as u32;
                    Arc::new(Part { inner, indices: None, relabel: None, offset, permute: task.permute })
                }
            }
        };
        list.push(TaskData { name: task.name.clone(), train: under(data.train), eval: under(data.eval) });
    }
    let heads = (continual.heads == HeadKind::Task).then_some(Heads(ranges));
    Ok(Tasks { list, classes, heads, notes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Protection;

    fn recipe(heads: HeadKind, tasks: &[(&str, &[&str], Option<u64>)]) -> (Recipe, ContinualConfig) {
        let mut table = Recipe::table("glyphs").unwrap();
        crate::recipe::set(&mut table, "data.glyphs.classes=12").unwrap();
        crate::recipe::set(&mut table, "data.glyphs.train=120").unwrap();
        crate::recipe::set(&mut table, "data.glyphs.eval=24").unwrap();
        let task = |(name, classes, permute): &(&str, &[&str], Option<u64>)| TaskConfig {
            name: name.to_string(),
            data: None,
            classes: classes.iter().map(|c| c.to_string()).collect(),
            permute: *permute,
        };
        let continual = ContinualConfig {
            method: Protection::Finetune,
            heads,
            validation: None,
            ewc: Default::default(),
            replay: Default::default(),
            field: Default::default(),
            task: tasks.iter().map(task).collect(),
        };
        (Recipe::resolve(table).unwrap(), continual)
    }

    #[test]
    fn labels_are_shared_or_own() {
        let tasks: &[(&str, &[&str], Option<u64>)] =
            &[("a", &["1", "0"], None), ("b", &["A", "2", "0"], None)];
        let (recipe, continual) = recipe(HeadKind::Shared, tasks);
        let shared = open(&recipe, &continual).unwrap();
        assert_eq!(shared.classes, ["1 / A", "0 / 2", "0"]);
        assert!(shared.heads.is_none());
        // Twelve classes take turns: of 120 images 10 are of each.
        assert_eq!((shared.list[0].train.len(), shared.list[1].train.len()), (20, 30));
        let labels =
            |source: &Arc<dyn Source>| (0..source.len()).map(|i| source.label(i)).collect::<Vec<_>>();
        assert_eq!(labels(&shared.list[0].eval), [1, 0, 1, 0]);
        let own = open(&recipe, &ContinualConfig { heads: HeadKind::Task, ..continual.clone() }).unwrap();
        assert_eq!(own.classes, ["1", "0", "A", "2", "0 of b"]);
        assert_eq!(own.heads, Some(Heads(vec![0..2, 2..5])));
        assert_eq!(labels(&own.list[1].eval), [4, 3, 2, 4, 3, 2]);
        let held = ContinualConfig { validation: Some(5), ..continual.clone() };
        let held = open(&recipe, &held).unwrap();
        assert_eq!((held.list[0].train.len(), held.list[0].eval.len()), (15, 5));
        let before = shared.list[0].train.image(15).unwrap();
        assert_eq!(held.list[0].eval.image(0).unwrap(), before);
        let strange = ContinualConfig { validation: Some(20), ..continual };
        assert!(open(&recipe, &strange).err().unwrap().to_string().contains("20 of 20 training images"));
    }

    #[test]
    fn pixels_are_put_in_an_order_and_nothing_else() {
        let (recipe, continual) = recipe(HeadKind::Shared, &[("a", &[], None), ("b", &[], Some(7))]);
        let tasks = open(&recipe, &continual).unwrap();
        let (plain, permuted) = (&tasks.list[0].train, &tasks.list[1].train);
        let (a, b) = (plain.image(3).unwrap(), permuted.image(3).unwrap());
        assert_ne!(a, b);
        let sorted = |image: &Image| {
            let mut pixels = image.pixels.clone();
            pixels.sort_unstable();
            pixels
        };
        assert_eq!((sorted(&a), plain.label(3)), (sorted(&b), permuted.label(3)));
        // The same order for every image.
        let order = |i: usize| permuted.image(i).unwrap().pixels;
        assert_eq!(order(3), order(3));
    }

    #[test]
    fn joined_sources_follow_one_another() {
        let (recipe, continual) = recipe(HeadKind::Class, &[("a", &["0"], None), ("b", &["1", "2"], None)]);
        let tasks = open(&recipe, &continual).unwrap();
        let [a, b] = [&tasks.list[0].train, &tasks.list[1].train];
        let joined = Joined::new(vec![(a.clone(), vec![3, 1]), (b.clone(), vec![]), (b.clone(), vec![5])]);
        assert_eq!(joined.len(), 3);
        assert_eq!(joined.image(1).unwrap(), a.image(1).unwrap());
        assert_eq!((joined.label(2), joined.name(2)), (b.label(5), b.name(5)));
    }
}
