//! Query-key reparameterization on the road: which attentions, what it does to the model, what it costs.

use candle_core::Tensor;
use indexmap::IndexMap;

use super::Target;
use crate::models::attention::AttentionPlace;
use crate::models::VisionConfig;
use crate::recipe::{QkrBias, Recipe};
use crate::select::select;
use crate::train::Progress;
use crate::transform;
use crate::weights::{Centering, Grid, Weights};
use crate::{Error, Result};

/// The attentions whose query and key the recipe makes one weight.
pub fn products(recipe: &Recipe, config: &VisionConfig) -> Result<Vec<AttentionPlace>> {
    let Some(qkr) = &recipe.qkr else { return Ok(Vec::new()) };
    let places = config.attentions();
    let names: Vec<&str> = places.iter().map(|place| place.inner.as_str()).collect();
    let picked: Vec<String> = select(&qkr.targets, &names)
        .map_err(|e| Error::usage(format!("qkr.{e}")))?
        .into_iter()
        .map(String::from)
        .collect();
    Ok(places.into_iter().filter(|place| picked.contains(&place.inner)).collect())
}

/// What is for query and key of each product, as one entry for the product: an error where the two
/// differ. `chosen` maps names of weights to what is for them.
pub fn merge(places: &[AttentionPlace], chosen: &mut IndexMap<String, Target>) -> Result<()> {
    for place in places {
        let [query, key] = place.factors().map(|name| (chosen.shift_remove(&name), name));
        let transform = |target: Option<Target>| target.map(|t| t.transform);
        if transform(query.0) != transform(key.0) {
            let of = |t: Option<Target>| transform(t).map_or("none".into(), |i| format!("transform.{i}"));
            let (q, k) = (of(query.0), of(key.0));
            return Err(Error::usage(format!(
                "qkr: {} is for {q} and {} for {k}, expected one transform for both",
                query.1, key.1
            )));
        }
        // Where one of them keeps more bits than the other, so does their product.
        let target = query.0.zip(key.0).map(|(q, k)| Target { bits: q.bits.max(k.bits), ..q });
        chosen.extend(target.map(|target| (place.product(), target)));
    }
    Ok(())
}

/// Makes query and key one weight where the recipe says so, or everywhere where the model was `trained` so;
/// what was chosen for both is for it.
pub fn reparameterize(
    recipe: &Recipe,
    config: &VisionConfig,
    trained: bool,
    weights: &mut Weights,
    chosen: &mut IndexMap<String, Target>,
) -> Result<()> {
    let (places, keep) = match trained {
        true => (config.attentions(), false),
        false => {
            let keep = recipe.qkr.as_ref().is_some_and(|qkr| qkr.bias == QkrBias::KeepQ);
            (products(recipe, config)?, keep)
        }
    };
    merge(&places, chosen)?;
    for place in &places {
        transform::reparameterize(weights, &place.inner, place.heads, keep)?;
    }
    Ok(())
}

/// Says how far the logits of `images` move when query and key become one weight, before anything is
/// quantized.
pub fn say_moved(
    recipe: &Recipe,
    config: &VisionConfig,
    weights: &Weights,
    images: &Tensor,
    progress: &dyn Progress,
) -> Result<()> {
    if recipe.qkr.is_none() {
        return Ok(());
    }
    let before = weights.folded()?;
    let mut after = before.clone();
    reparameterize(recipe, config, false, &mut after, &mut IndexMap::new())?;
    let logits = |weights: &Weights| config.build(weights)?.forward(images)?.logits();
    let (before, after) = (logits(&before)?, logits(&after)?);
    let largest = |t: Tensor| -> Result<f32> { Ok(t.abs()?.flatten_all()?.max(0)?.to_scalar()?) };
    let (moved, size) = (largest((&after - &before)?)?, largest(before)?);
    progress.note(&format!(
        "query-key reparameterization: the logits of {} images move by at most {moved:.2e} (largest {size:.2e})",
        images.dim(0)?
    ));
    Ok(())
}

/// What the product of an attention costs beside query and key on their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Codes of the product: heads/2 times those of query and key.
    pub codes: usize,
    /// Packed bytes of the product, steps included.
    pub bytes: usize,
    /// Packed bytes of query and key at the same width.
    pub separate_bytes: usize,
    /// Packed bytes of query and key at 8 bits.
    pub separate_8_bytes: usize,
}

/// The cost of a product at `bits` bits.
pub fn cost(place: &AttentionPlace, bits: u8) -> Result<Cost> {
    let (rows, width) = (place.heads * place.width, place.width);
    let bytes = |rows: usize, bits: u8| -> Result<usize> {
        Ok(rows * (Grid::new(bits, Centering::MidRise)?.row_bytes(width) + 4))
    };
    Ok(Cost {
        codes: rows * width,
        bytes: bytes(rows, bits)?,
        separate_bytes: bytes(2 * width, bits)?,
        separate_8_bytes: bytes(2 * width, 8)?,
    })
}

/// What there is to say of the products of a recipe: codes and bytes beside query and key on their own,
/// and a warning where a product takes more bytes than 8-bit query and key.
pub fn notes(places: &[AttentionPlace], bits: impl Fn(&str) -> Option<u8>) -> Result<Vec<String>> {
    let (mut total, mut heavy) = (Cost { codes: 0, bytes: 0, separate_bytes: 0, separate_8_bytes: 0 }, 0);
    let mut separate = 0usize;
    for place in places {
        let Some(bits) = bits(&place.product()) else { continue };
        let one = cost(place, bits)?;
        separate += 2 * place.width * place.width;
        total.codes += one.codes;
        total.bytes += one.bytes;
        total.separate_bytes += one.separate_bytes;
        total.separate_8_bytes += one.separate_8_bytes;
        heavy += usize::from(one.bytes > one.separate_8_bytes);
    }
    if total.codes == 0 {
        return Ok(Vec::new());
    }
    let mut notes = vec![format!(
        "products of query and key: {} codes where query and key have {separate} ({:.2} times), {} bytes packed \
         where those take {} at the same width",
        total.codes,
        total.codes as f64 / separate as f64,
        total.bytes,
        total.separate_bytes
    )];
    if heavy > 0 {
        notes.push(format!(
            "warning: {heavy} of {} products take more bytes packed ({}) than query and key at 8 bits ({}); \
             qkr.targets can leave them out",
            places.len(),
            total.bytes,
            total.separate_8_bytes
        ));
    }
    Ok(notes)
}

/// The attentions whose query and key a store holds as one weight.
pub fn held(config: &VisionConfig, weights: &Weights) -> Vec<AttentionPlace> {
    config.attentions().into_iter().filter(|place| weights.contains(&place.product())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(width: usize, heads: usize) -> AttentionPlace {
        AttentionPlace { inner: "b".into(), output: "o".into(), width, heads, qkv_bias: true }
    }

    #[test]
    fn the_published_sizes() {
        // ofq.md 3: DeiT-T and stage 4 of Swin-T.
        let tiny = cost(&place(192, 3), 2).unwrap();
        assert_eq!((tiny.codes, tiny.bytes), (110_592, 110_592 / 4 + 4 * 576));
        let swin = cost(&place(768, 24), 2).unwrap();
        assert_eq!(swin.codes, 14_155_776);
        assert!(swin.bytes > swin.separate_8_bytes);
        let notes = notes(&[place(768, 24)], |_| Some(2)).unwrap();
        assert!(notes[0].contains("12.00 times") && notes[1].starts_with("warning: 1 of 1"), "{notes:?}");
        assert!(super::notes(&[place(192, 3)], |_| None).unwrap().is_empty());
        assert_eq!(super::notes(&[place(192, 3)], |_| Some(2)).unwrap().len(), 1);
    }

    #[test]
    fn one_transform_for_both() {
        let place = place(4, 2);
        let [query, key] = place.factors();
        let target = |transform: usize, bits: u8| Target { transform, bits };
        let mut chosen: IndexMap<String, Target> =
            [(query.clone(), target(0, 2)), (key.clone(), target(0, 4))].into();
        merge(std::slice::from_ref(&place), &mut chosen).unwrap();
        assert_eq!(chosen, IndexMap::from([(place.product(), target(0, 4))]));
        let mut chosen: IndexMap<String, Target> = [(query, target(0, 2)), (key, target(1, 2))].into();
        let error = merge(std::slice::from_ref(&place), &mut chosen).unwrap_err().to_string();
        assert!(
            error.contains("b.query.weight is for transform.0 and b.key.weight for transform.1"),
            "{error}"
        );
    }
}
