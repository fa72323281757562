//! Text from a language model, token by token.

use candle_core::Device;
use serde::Serialize;

use crate::data::text::Tokenizer;
use crate::models::{Cache, Llama};
use crate::random::Random;
use crate::train::signal;
use crate::{Error, Result};

/// How the next token is drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0: the largest logit is taken.
    pub temperature: f64,
    /// Only so many of the likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability; 1: all.
    pub top_p: f64,
    /// Only tokens of at least this share of the likeliest one's probability; 0: all.
    pub min_p: f64,
    /// Logits of tokens that were seen are divided by it where positive, else multiplied; 1: none.
    pub repetition_penalty: f64,
    /// The seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Errs on what is out of range, naming the flag.
    pub fn check(&self) -> Result<()> {
        let bad = |flag: &str, value: f64, expected: &str| {
            Err(Error::usage(format!("--{flag} {value}: expected {expected}")))
        };
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return bad("temperature", self.temperature, "0 or more");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("top-p", self.top_p, "above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return bad("min-p", self.min_p, "0 to 1");
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return bad("repetition-penalty", self.repetition_penalty, "above 0");
        }
        Ok(())
    }

    /// The token after `seen`, number `step` of the answer.
    pub fn pick(&self, logits: &[f32], seen: &[u32], step: u64) -> Result<u32> {
        let mut logits = logits.to_vec();
        if self.repetition_penalty != 1.0 {
            let penalty = self.repetition_penalty as f32;
            let mut known = seen.to_vec();
            known.sort_unstable();
            known.dedup();
            for id in known {
                if let Some(l) = logits.get_mut(id as usize) {
                    *l = if *l > 0.0 { *l / penalty } else { *l * penalty };
                }
            }
        }
        if let Some(at) = logits.iter().position(|l| l.is_nan()) {
            return Err(Error::NotFinite(format!("the logit of token {at} is NaN, expected a number")));
        }
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let of = |id: u32| logits[id as usize];
        // Equal logits in order of their ids, so that a draw is the same everywhere.
        order.sort_by(|a, b| of(*b).total_cmp(&of(*a)).then(a.cmp(b)));
        let Some(&first) = order.first() else { return Err(Error::Run("found no logits".into())) };
        if self.temperature == 0.0 {
            return Ok(first);
        }
        let top = f64::from(of(first));
        let weight = |id: u32| ((f64::from(of(id)) - top) / self.temperature).exp();
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let total: f64 = order.iter().map(|id| weight(*id)).sum();
        let (mut reached, mut kept) = (0f64, 0usize);
        for id in &order {
            // The first one has weight 1.
            if kept > 0 && (reached >= self.top_p * total || weight(*id) < self.min_p) {
                break;
            }
            reached += weight(*id);
            kept += 1;
        }
        let mut random = Random::new(self.seed, "generate", &[step]);
        let mut draw = f64::from(random.uniform()) * reached;
        for id in &order[..kept] {
            draw -= weight(*id);
            if draw < 0.0 {
                return Ok(*id);
            }
        }
        Ok(order[kept - 1])
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// The model said so.
    Eos,
    /// A stop text came.
    Stop,
    /// As many tokens as were asked for, or as the model was made for.
    Length,
    /// A signal.
    Signal,
}

/// An answer.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// Its text, without a stop text.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub end: End,
    /// Seconds to the first token.
    pub first_s: f64,
    /// Tokens a second after the first.
    pub tokens_per_s: f64,
}

/// Where generation ends.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Tokens at most.
    pub tokens: usize,
    /// Texts that end an answer; they are not part of it.
    pub stop: Vec<String>,
    /// Whether the end-of-sequence token is ignored.
    pub ignore_eos: bool,
}

/// Continues `prompt` (at least one token); `show` is handed each piece of text as soon as it is whole and
/// cannot be the beginning of a stop text.
///
/// Errs where the prompt leaves no room for an answer.
pub fn generate(
    model: &Llama,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    sampling: &Sampling,
    limits: &Limits,
    device: &Device,
    show: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Answer> {
    let most = model.config().max_positions;
    if prompt.is_empty() {
        return Err(Error::usage("--prompt: found no token, expected at least one"));
    }
    if prompt.len() >= most {
        let (found, most) = (prompt.len(), most);
        return Err(Error::usage(format!(
            "--prompt: {found} tokens leave no room, the model was made for {most}"
        )));
    }
    let room = (prompt.len() + limits.tokens).min(most);
    let begun = std::time::Instant::now();
    let mut cache = Cache::new(model.config().layers, room);
    let mut stream = tokenizer.stream(prompt);
    let mut seen = prompt.to_vec();
    let mut logits = model.step(prompt, &mut cache, device)?.to_vec1::<f32>()?;
    let (mut text, mut shown) = (String::new(), 0usize);
    let mut first_s = 0.0;
    let mut end = End::Length;
    while seen.len() < room {
        let step = (seen.len() - prompt.len()) as u64;
        let token = sampling.pick(&logits, &seen, step)?;
        if step == 0 {
            first_s = begun.elapsed().as_secs_f64();
        }
        if tokenizer.eos().contains(&token) && !limits.ignore_eos {
            end = End::Eos;
            break;
        }
        seen.push(token);
        text += &stream.push(token)?;
        if let Some(at) = limits.stop.iter().filter_map(|s| text.find(s.as_str())).min() {
            text.truncate(at);
            end = End::Stop;
            break;
        }
        let safe = text.len() - held_back(&text, &limits.stop);
        if safe > shown {
            show(&text[shown..safe])?;
            shown = safe;
        }
        if signal::asked().is_some() {
            end = End::Signal;
            break;
        }
        if seen.len() < room {
            logits = model.step(&[token], &mut cache, device)?.to_vec1::<f32>()?;
        }
    }
    if end != End::Stop {
        text += &stream.finish()?;
    }
    if text.len() > shown {
        show(&text[shown..])?;
    }
    let tokens = seen[prompt.len()..].to_vec();
    let rest = (begun.elapsed().as_secs_f64() - first_s).max(1e-9);
    Ok(Answer { text, end, first_s, tokens_per_s: tokens.len().saturating_sub(1) as f64 / rest, tokens })
}

/// Bytes at the end of `text` that may be the beginning of a stop text.
fn held_back(text: &str, stop: &[String]) -> usize {
    let longest = |stop: &String| {
        let starts = stop.char_indices().map(|(at, _)| at).filter(|at| *at > 0);
        starts.filter(|at| text.ends_with(&stop[..*at])).max().unwrap_or(0)
    };
    stop.iter().map(longest).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_logit_wins_without_temperature() {
        let pick =
            |sampling: &Sampling, seen: &[u32]| sampling.pick(&[0.5, 2.0, 2.0, -1.0], seen, 0).unwrap();
        let plain = Sampling::default();
        assert_eq!(pick(&plain, &[]), 1);
        // 2 / 8 falls behind.
        let penalty = Sampling { repetition_penalty: 8.0, ..plain.clone() };
        assert_eq!(pick(&penalty, &[1, 1]), 2);
        assert_eq!(pick(&penalty, &[1, 2]), 0);
        assert!(plain.pick(&[0.0, f32::NAN], &[], 0).unwrap_err().to_string().contains("token 1"));
    }

    /// Probabilities 1/2, 1/4, 1/8, 1/8.
    #[test]
    fn draws_follow_the_probabilities() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.125].iter().map(|p| p.ln()).collect();
        let counts = |sampling: &Sampling| {
            let mut counts = [0usize; 4];
            for step in 0..4000 {
                counts[sampling.pick(&logits, &[], step).unwrap() as usize] += 1;
            }
            counts
        };
        let all = Sampling { temperature: 1.0, seed: 3, ..Sampling::default() };
        let got = counts(&all);
        for (got, want) in got.iter().zip([2000.0, 1000.0, 500.0, 500.0]) {
            // Four deviations of a binomial draw.
            assert!((*got as f64 - want).abs() < 4.0 * (want * (1.0 - want / 4000.0)).sqrt(), "{got} {want}");
        }
        assert_eq!(counts(&Sampling { top_k: 1, ..all.clone() })[0], 4000);
        assert_eq!(counts(&Sampling { top_p: 0.7, ..all.clone() })[2..], [0, 0]);
        assert_eq!(counts(&Sampling { min_p: 0.3, ..all.clone() })[2..], [0, 0]);
        assert_ne!(counts(&Sampling { min_p: 0.2, ..all.clone() })[3], 0);
        assert_eq!(got, counts(&all));
        assert_ne!(got, counts(&Sampling { seed: 4, ..all }));
    }

    #[test]
    fn what_may_become_a_stop_text_waits() {
        let stop = vec!["\n\n".to_string(), "End".to_string()];
        assert_eq!(held_back("abc", &stop), 0);
        assert_eq!(held_back("abc\n", &stop), 1);
        assert_eq!(held_back("abc E", &stop), 1);
        assert_eq!(held_back("abc En", &stop), 2);
    }

    #[test]
    fn wrong_settings_are_named() {
        let refusal = |sampling: Sampling| sampling.check().unwrap_err().to_string();
        assert!(refusal(Sampling { temperature: -1.0, ..Sampling::default() }).contains("--temperature -1"));
        assert!(refusal(Sampling { top_p: 0.0, ..Sampling::default() }).contains("--top-p 0"));
        assert!(Sampling::default().check().is_ok());
    }
}
