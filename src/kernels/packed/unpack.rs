//! Packed fields as floats, 16 at a time.

use super::edges::per_isa;

/// Fields that are unpacked together; they end at a whole byte at every width.
const BLOCK: usize = 16;

per_isa! {
    /// `out = scale (lo + field + offset)` for the fields of `bits` bits, up to 8, from number `from` on of `codes`, least
    /// significant bits first. As many as `out` holds.
    pub(super) fn unpack(
        codes: &[u8], bits: u8, from: usize, lo: i32, offset: f32, scale: f32, out: &mut [f32],
    ) {
        let to = (lo, offset, scale);
        // One by one to the next whole byte.
        let width = usize::from(bits);
        let ahead = (0..8).find(|ahead| ((from + ahead) * width).is_multiple_of(8)).unwrap_or(0);
        let (head, out) = out.split_at_mut(ahead.min(out.len()));
        singles(codes, (width, from), to, head);
        let from = from + ahead;
        let whole = out.len() / BLOCK * BLOCK;
        let (blocks, tail) = out.split_at_mut(whole);
        let source = codes.get(from * width / 8..).unwrap_or_default();
        match bits {
            2 => several::<2>(source, to, blocks),
            3 => several::<3>(source, to, blocks),
            4 => several::<4>(source, to, blocks),
            8 => several::<8>(source, to, blocks),
            _ => singles(codes, (width, from), to, blocks),
        }
        singles(codes, (width, from + whole), to, tail);
    }
}

/// Fields one by one from number `from` on; those behind the last byte are 0.
#[inline(always)]
fn singles(
    codes: &[u8],
    (bits, from): (usize, usize),
    (lo, offset, scale): (i32, f32, f32),
    out: &mut [f32],
) {
    let byte = |at: usize| u32::from(codes.get(at).copied().unwrap_or(0));
    for (i, out) in out.iter_mut().enumerate() {
        let at = (from + i) * bits;
        let field = (byte(at / 8) | byte(at / 8 + 1) << 8) >> (at % 8) & ((1 << bits) - 1);
        *out = scale * ((field as i32 + lo) as f32 + offset);
    }
}

/// Whole blocks of fields from the first byte of `codes` on.
#[inline(always)]
fn several<const BITS: usize>(codes: &[u8], (lo, offset, scale): (i32, f32, f32), blocks: &mut [f32]) {
    let mask = (1u32 << BITS) - 1;
    let bytes = BLOCK * BITS / 8;
    let of = |field: u32| scale * ((field as i32 + lo) as f32 + offset);
    for (out, source) in blocks.chunks_exact_mut(BLOCK).zip(codes.chunks_exact(bytes)) {
        if BITS == 8 {
            for (out, &field) in out.iter_mut().zip(source) {
                *out = of(u32::from(field));
            }
            continue;
        }
        let mut word = [0u8; 8];
        word[..bytes.min(8)].copy_from_slice(&source[..bytes.min(8)]);
        let word = u64::from_le_bytes(word);
        for (i, out) in out.iter_mut().enumerate() {
            // Fields of two bits are a matter of 32: twice as many to a vector.
            let field = if BITS == 2 { (word as u32) >> (i * BITS) } else { (word >> (i * BITS)) as u32 };
            *out = of(field & mask);
        }
    }
}
