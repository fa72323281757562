//! The integer road of a transformer block: the forward pass of a packed model between whose products only
//! codes pass.
//!
//! Where every tap of a block has a quantizer on a grid and every weight is packed with one step a row, all
//! products of the block are sums of integers, attention's included. Steps come in at the edges, shifts are
//! folded (ofq.md 2.2): what a quantizer adds behind its codes goes into the next bias, into a number for each
//! key, or, behind the values, into a multiple of the sum of the probabilities' codes. Anything else a block
//! may hold (adapters, trainables, groups of columns) keeps the road of tensors, which is also the oracle.

mod attention;
mod block;
mod layer;
#[cfg(test)]
mod tests;

pub(super) use block::IntegerBlock;

/// Shows the codes behind a tap: the tap's place, the first row of `[batch, tokens]` (or of `[batch, heads,
/// tokens]`) that they are, and the codes.
type See<'a> = &'a (dyn Fn(&'static str, usize, crate::kernels::packed::CodesRef<'_>) + Sync);
