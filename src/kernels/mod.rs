//! The differentiable ops: each file is the whole story of one op, on every device.
//!
//! A file holds, in this order: the equation and its source, `reference` (plain candle ops, slow
//! and obvious, differentiable everywhere), the custom op with its CPU body and its backward, and
//! one public function that checks shapes and dtypes and chooses. On the CPU f32 and f64 take the
//! kernel, f16 and bf16 are computed through f32; on a CUDA device f32, f16 and bf16 take the op's
//! CUDA body where it has one (kernels/*.cu), and everything else the reference.
//!
//! Every CPU body cuts its work into chunks that depend on shapes alone and adds partial sums in
//! index order, so a result is the same to the bit for any number of threads.

// SIMD and product calls: each unsafe block names the check that makes it sound.
#![allow(unsafe_code)]

mod adamw;
mod arithmetic;
mod attention;
mod best_step;
mod block_affine;
mod block_sum;
mod change;
mod classifier;
mod classp;
mod conv;
mod cpu;
mod cross_entropy;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod dropout;
mod fake_quant;
mod gelu;
mod general;
pub(crate) mod gram;
mod linear;
mod low_rank;
mod magnitude;
mod merged;
mod norm;
pub mod packed;
mod patchify;
mod pick;
mod plackett_luce;
mod pool;
mod product;
mod qk_product;
mod rectified;
mod relu;
mod rms_norm;
mod rope;
mod rows;
mod scale;
mod softmax;
mod swiglu;
pub mod tape;
#[cfg(test)]
mod testing;

pub use adamw::{adamw_step, AdamWParams, Moments};
pub use arithmetic::{arithmetic, round_activations, rounds_activations, set_arithmetic, Arithmetic};
pub use attention::{attention, attention_mix, attention_probs, causal_attention};
pub use best_step::{absmax_step, best_step, round_to};
pub use block_affine::block_affine;
pub use block_sum::block_sum;
pub use classifier::{classifier_cross_entropy, classifier_cross_entropy_in};
pub use classp::{classp_step, ClasspParams, GradSum, SumFigures, Test};
pub use conv::{conv2d, Convolution};
pub use cross_entropy::{cross_entropy, soft_cross_entropy};
pub use dropout::{dropout, DropoutMask};
pub use fake_quant::{
    dequantize, lsq, lsq_codes, lsq_init, lsq_shifted, quantize, statsq, statsq_annealed, statsq_codes,
    statsq_free, statsq_scale, Levels, SCALE_FLOOR,
};
pub use gelu::gelu;
pub use linear::{add_bias, frozen_matmul, linear};
pub use low_rank::{low_rank, low_rank_change, shared_block, shared_block_change};
pub use magnitude::{row_norms, scale_columns};
pub use merged::{block_affine_merged, low_rank_merged, shared_block_merged};
pub use norm::layer_norm;
pub use packed::{
    packed_codes_matmul, packed_matmul, packed_matmul_int8, packed_quantized_matmul, packed_rows,
    packed_values, Groups, PackedRows, Rounding,
};
pub use patchify::patchify;
pub use pick::pick_rows;
pub use plackett_luce::plackett_luce;
pub use pool::max_pool2;
pub use qk_product::qk_product;
pub use rectified::rectified_moments;
pub use relu::relu;
pub use rms_norm::rms_norm;
pub use rope::{rope, Rotations};
pub use rows::{frozen_rows_matmul, FrozenRows};
pub use scale::scale_leading;
pub use softmax::softmax;
pub use swiglu::swiglu;
pub use tape::add;

/// The plain candle forms of the ops, as oracles for tests and benches.
pub mod reference {
    pub use super::adamw::reference as adamw_step;
    pub use super::attention::{
        reference_causal as causal_attention, reference_mix as attention_mix,
        reference_probs as attention_probs,
    };
    pub use super::block_affine::reference as block_affine;
    pub use super::block_sum::reference as block_sum;
    pub use super::classifier::reference as classifier_cross_entropy;
    pub use super::classp::reference as classp_step;
    pub use super::conv::reference as conv2d;
    pub use super::cross_entropy::{reference as cross_entropy, reference_soft as soft_cross_entropy};
    pub use super::dropout::reference as dropout;
    pub use super::fake_quant::{
        reference_lsq as lsq, reference_statsq as statsq, reference_statsq_free as statsq_free,
    };
    pub use super::gelu::reference as gelu;
    pub use super::linear::{reference as linear, reference_add_bias as add_bias};
    pub use super::low_rank::{reference as low_rank, reference_shared_block as shared_block};
    pub use super::magnitude::{reference_row_norms as row_norms, reference_scale_columns as scale_columns};
    pub use super::merged::{
        reference_block_affine as block_affine_merged, reference_low_rank as low_rank_merged,
        reference_shared_block as shared_block_merged,
    };
    pub use super::norm::reference as layer_norm;
    pub use super::packed::reference as packed_matmul;
    pub use super::pick::reference as pick_rows;
    pub use super::plackett_luce::reference as plackett_luce;
    pub use super::pool::reference as max_pool2;
    pub use super::qk_product::reference as qk_product;
    pub use super::rectified::reference as rectified_moments;
    pub use super::relu::reference as relu;
    pub use super::rms_norm::reference as rms_norm;
    pub use super::rope::reference as rope;
    pub use super::scale::reference as scale_leading;
    pub use super::softmax::reference as softmax;
    pub use super::swiglu::reference as swiglu;
}
