//! Every recipe resolves, comes back from what it is saved as, and says what is wrong with a bad one.

use std::path::Path;

use qtune::recipe::{put, set, Recipe, EMBEDDED};

#[test]
fn every_file_is_compiled_in_and_resolves() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        // Beside the recipes lies the model that one of them trained.
        if path.extension().is_none_or(|ending| ending != "toml") {
            continue;
        }
        let stem = path.file_stem().unwrap().to_str().unwrap().to_string();
        assert!(EMBEDDED.iter().any(|(name, _)| *name == stem), "{stem} is not compiled in");
        files.push(stem);
    }
    assert_eq!(files.len(), EMBEDDED.len());
    for (name, _) in EMBEDDED {
        let mut table = Recipe::table(name).unwrap();
        if table.contains_key("ablation") {
            // Variants of a recipe: each of them resolves.
            let ablation = qtune::ablation::split(&mut table).unwrap();
            ablation.cells(&table, Path::new("out")).unwrap();
        }
        let recipe = Recipe::resolve(table).unwrap();
        assert_eq!(&recipe.name, name);
        let saved = recipe.to_toml().unwrap();
        let again = Recipe::resolve(saved.parse().unwrap()).unwrap();
        assert_eq!(recipe, again, "{name}");
    }
}

fn wrong(change: impl FnOnce(&mut toml::Table)) -> String {
    let mut table = Recipe::table("glyphs").unwrap();
    change(&mut table);
    let error = Recipe::resolve(table).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    let text = error.to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

#[test]
fn unknown_keys_and_wrong_types_are_named() {
    let text = wrong(|t| set(t, "train.batchsize=8").unwrap());
    assert!(text.contains("batchsize") && text.contains("nearest: batch_size"), "{text}");
    let text = wrong(|t| set(t, "train.batch_size=\"many\"").unwrap());
    assert!(text.contains("many") && text.contains("batch_size"), "{text}");
    let text = wrong(|t| set(t, "transform.0.bits=5").unwrap());
    assert!(text.contains("transform.0") && text.contains("bits = 5"), "{text}");
    let text = wrong(|t| set(t, "transform.1.group=0").unwrap());
    assert!(text.contains("transform.1.group = 0"), "{text}");
    let text = wrong(|t| set(t, "activation.bits=1").unwrap());
    assert!(text.contains("activation.bits = 1"), "{text}");
    let text = wrong(|t| set(t, "optimizer.kind=lamb").unwrap());
    assert!(text.contains("lamb"), "{text}");
    let text = wrong(|t| set(t, "optimizer.beta3=0.5").unwrap());
    assert!(text.contains("beta3") && text.contains("nearest: beta"), "{text}");
    let text = wrong(|t| set(t, "train.accumulate=0").unwrap());
    assert!(text.contains("train.accumulate = 0"), "{text}");
    let text = wrong(|t| set(t, "phase.1.lr=nan").unwrap());
    assert!(text.contains("phase.1.lr"), "{text}");
    let text = wrong(|t| set(t, "augment.erase=1.5").unwrap());
    assert!(text.contains("augment.erase = 1.5"), "{text}");
    let text = wrong(|t| set(t, "augment.rand_augment=rand-m9-x3-inc1").unwrap());
    assert!(text.contains("rand_augment") && text.contains("x3"), "{text}");
    let text = wrong(|t| set(t, "augment.erase_mode=noise").unwrap());
    assert!(text.contains("noise") && text.contains("pixel"), "{text}");
    let text = wrong(|t| set(t, "distill.kind=hard").unwrap());
    assert!(text.contains("hard") && text.contains("pld"), "{text}");
    let text = wrong(|t| set(t, "model.heads=5").unwrap());
    assert!(text.contains("model.heads = 5"), "{text}");
}

#[test]
fn a_group_of_columns_is_kept_and_absent_where_it_was_not_set() {
    let mut table = Recipe::table("glyphs").unwrap();
    set(&mut table, "transform.0.group=64").unwrap();
    let recipe = Recipe::resolve(table).unwrap();
    let text = recipe.to_toml().unwrap();
    let again = Recipe::resolve(text.parse().unwrap()).unwrap();
    assert_eq!((recipe.transform[0].group, recipe.transform[1].group), (Some(64), None));
    assert_eq!(recipe, again);
    assert_eq!(text.matches("group").count(), 1, "{text}");
}

#[test]
fn paths_of_set_reach_arrays_and_refuse_what_is_not_there() {
    let mut table = Recipe::table("glyphs").unwrap();
    set(&mut table, "phase.1.epochs=0.5").unwrap();
    set(&mut table, "data.path=/some/where").unwrap();
    let recipe = Recipe::resolve(table.clone()).unwrap();
    assert_eq!(recipe.phase[1].epochs, 0.5);
    assert_eq!(recipe.data.path.as_deref(), Some(Path::new("/some/where")));
    assert!(set(&mut table, "phase.7.epochs=1").unwrap_err().to_string().contains("index below 2"));
    assert!(set(&mut table, "no equals sign").unwrap_err().to_string().contains("key.path=value"));
    assert!(put(&mut table, "name.x", toml::Value::Integer(1)).unwrap_err().contains("neither a table"));
}

/// The table of the published runs (ofq.md 6.2): batch, rate, decay, warm-up, mixing.
#[test]
fn the_published_runs_are_as_published() {
    for (model, bits) in [("tiny", 2), ("tiny", 3), ("tiny", 4), ("small", 2), ("small", 3), ("small", 4)] {
        let name = format!("deit-{model}-w{bits}a{bits}");
        let r = Recipe::resolve(Recipe::table(&name).unwrap()).unwrap();
        let mixed = model == "small" && bits > 2;
        let phase = &r.phase[0];
        let got = (r.train.batch_size * r.train.accumulate, phase.lr, phase.warmup_epochs, phase.warmup_lr);
        let want = if mixed { (800, 3.2e-4, 0.0, 0.0) } else { (560, 5.47e-4, 5.0, 1e-6) };
        assert_eq!(got, want, "{name}");
        assert_eq!((phase.epochs, phase.cosine_span, phase.min_lr), (310.0, Some(300.0), 1e-5), "{name}");
        let calm = &r.phase[1];
        assert_eq!((calm.epochs, calm.lr, calm.calm), (30.0, 1e-5, Some(0.005)), "{name}");
        assert_eq!(r.qkr.as_ref().map(|q| q.bias), Some(qtune::recipe::QkrBias::Drop), "{name}");
        assert_eq!((r.transform[0].bits, r.transform[1].bits, r.activation.bits), (bits, 8, bits), "{name}");
        let qtune::optim::OptimizerConfig::Adamw(adamw) = &r.optimizer else { panic!("{name}") };
        assert_eq!(adamw.weight_decay, if mixed { 0.0 } else { 0.05 }, "{name}");
        let a = &r.augment;
        let got = (a.mixup, a.cutmix, a.label_smoothing, a.repeats);
        assert_eq!(got, if mixed { (0.8, 1.0, 0.1, 3) } else { (0.0, 0.0, 0.0, 1) }, "{name}");
        assert_eq!((a.erase, a.erase_mode, a.flip), (0.25, qtune::data::EraseMode::Pixel, true), "{name}");
        assert!(a.resized_crop && a.random_interpolation && a.crop_scale == [0.08, 1.0], "{name}");
        let rand = a.rand_augment.clone().map(String::from);
        assert_eq!(rand.as_deref(), Some("rand-m9-mstd0.5-inc1"), "{name}");
    }
    // What a recipe turns on can be turned off.
    let mut table = Recipe::table("deit-tiny-w2a2").unwrap();
    set(&mut table, "augment.rand_augment=none").unwrap();
    set(&mut table, "augment.resized_crop=false").unwrap();
    let recipe = Recipe::resolve(table).unwrap();
    assert_eq!((recipe.augment.rand_augment, recipe.augment.resized_crop), (None, false));
}

#[test]
fn a_recipe_that_is_not_there_lists_near_names() {
    let error = Recipe::table("vit-w2a3").unwrap_err().to_string();
    assert!(error.contains("nearest: vit-w2a3"), "{error}");
}

#[test]
fn a_mistake_in_a_file_is_reported_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.toml");
    let text = EMBEDDED[0].1.replace("batch_size = 100", "batch_sise = 100");
    assert_ne!(text, EMBEDDED[0].1);
    std::fs::write(&path, text).unwrap();
    let error = Recipe::table(path.to_str().unwrap()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("mine.toml") && text.contains("line") && text.contains("batch_sise"), "{text}");
    assert!(text.contains("nearest: batch_size") && !text.contains('\n'), "{text}");
    assert_eq!(error.exit_code(), 2);
}
