//! Bytes that start at a cache line, so that no 64-byte load of a panel straddles two.

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub [u8; Line::BYTES]);

impl Line {
    pub const BYTES: usize = 64;
    pub const ZERO: Line = Line([0; Line::BYTES]);
}

/// The bytes of some lines.
pub(super) fn bytes(lines: &[Line]) -> &[u8] {
    // SAFETY: a line is 64 bytes without padding (repr(C) of an array, size equal to its alignment), any of which is a u8.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), size_of_val(lines)) }
}

/// The bytes of some lines.
pub(super) fn bytes_mut(lines: &mut [Line]) -> &mut [u8] {
    // SAFETY: as in `bytes`; every value of a byte is a line's, and the borrow of the lines is unique.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), size_of_val(lines)) }
}
