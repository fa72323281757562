//! Shapes of layers that real models have, shared by the benches: `[in, out]` of a weight and the rows that go
//! through it.

#![allow(dead_code)] // Each bench is a crate of its own and takes what it needs.

/// One product: `rows` activations of `input` features through a weight `[output, input]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Where it comes from.
    pub of: &'static str,
    /// Activations: tokens of an image, of a prompt, or 1 in decoding.
    pub rows: usize,
    /// Input features.
    pub input: usize,
    /// Output features.
    pub output: usize,
}

impl Shape {
    /// Multiplications and additions.
    pub fn ops(&self) -> f64 {
        2.0 * self.rows as f64 * self.weights() as f64
    }

    /// Elements of the weight.
    pub fn weights(&self) -> usize {
        self.input * self.output
    }

    /// `197: 192->576`, or `4096->11008` of one row.
    pub fn text(&self) -> String {
        match self.rows {
            1 => format!("{}->{}", self.input, self.output),
            rows => format!("{rows}: {}->{}", self.input, self.output),
        }
    }
}

const fn shape(of: &'static str, rows: usize, input: usize, output: usize) -> Shape {
    Shape { of, rows, input, output }
}

/// One row: decoding, bound by reading the weight.
pub const GEMV: &[Shape] = &[
    shape("Llama 15M, hidden", 1, 288, 768),
    shape("Llama 15M, head", 1, 288, 32000),
    shape("SmolLM-135M, gate", 1, 576, 1536),
    shape("SmolLM-135M, head", 1, 576, 49152),
    shape("7B, attention", 1, 4096, 4096),
    shape("7B, gate", 1, 4096, 11008),
];

/// Many rows: images and prompts, bound by arithmetic.
pub const GEMM: &[Shape] = &[
    shape("vit-fashion, mlp, 8 images", 8 * 50, 96, 192),
    shape("DeiT-T, qkv", 197, 192, 576),
    shape("DeiT-T, mlp up", 197, 192, 768),
    shape("DeiT-T, mlp down", 197, 768, 192),
    shape("DeiT-S, mlp up", 197, 384, 1536),
    shape("DeiT-S, mlp down", 197, 1536, 384),
    shape("DeiT-S, mlp up, 8 images", 8 * 197, 384, 1536),
    shape("Llama 15M, gate, 256 tokens", 256, 288, 768),
    shape("SmolLM-135M, gate, 256 tokens", 256, 576, 1536),
    shape("7B, attention, 512 tokens", 512, 4096, 4096),
];

/// The largest weight of DeiT-T, the one that decides a step of its optimizer together with many like it, and others:
/// elements of one tensor.
pub const TENSORS: &[(&str, usize)] = &[
    ("DeiT-T, qkv", 192 * 576),
    ("DeiT-S, mlp up", 384 * 1536),
    ("SmolLM-135M, head", 576 * 49152),
    ("7B, attention", 4096 * 4096),
];
