//! The numbers of one matrix as they lie in a file, and how they become f64.

/// How a number is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    /// 64 bits.
    F64,
    /// 32 bits.
    F32,
    /// 16 bits, 5 of them exponent.
    F16,
    /// 16 bits, 8 of them exponent.
    Bf16,
}

impl Float {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Float::F64 => 8,
            Float::F32 => 4,
            Float::F16 | Float::Bf16 => 2,
        }
    }

    /// The name that files use.
    pub fn name(self) -> &'static str {
        match self {
            Float::F64 => "f64",
            Float::F32 => "f32",
            Float::F16 => "f16",
            Float::Bf16 => "bf16",
        }
    }
}

/// A matrix `[rows, cols]`, row-major, little-endian.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// `rows * cols` numbers.
    pub bytes: &'a [u8],
    /// How they are stored.
    pub float: Float,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

/// A factor that is a power of two, as two factors: one alone would overflow for numbers near the ends of
/// f64.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    exponent: i32,
    first: f64,
    second: f64,
}

impl Scale {
    /// Two to the power of `exponent`.
    pub fn two_to(exponent: i32) -> Self {
        let half = exponent / 2;
        Scale { exponent, first: 2f64.powi(half), second: 2f64.powi(exponent - half) }
    }

    /// The power of two that brings `largest`, positive and finite, into [1, 2).
    pub fn for_largest(largest: f64) -> Self {
        let mut exponent = 0;
        let mut value = largest;
        // Subnormal numbers have no exponent of their own to read off.
        if value < f64::MIN_POSITIVE {
            value *= 2f64.powi(64);
            exponent = 64;
        }
        Scale::two_to(exponent - (((value.to_bits() >> 52) & 0x7ff) as i32 - 1023))
    }

    /// `value` times the factor.
    pub fn apply(self, value: f64) -> f64 {
        value * self.first * self.second
    }

    /// `value` divided by the factor, at most the largest number.
    pub fn undo(self, value: f64) -> f64 {
        Scale::two_to(-self.exponent).apply(value).min(f64::MAX)
    }

    /// The natural logarithm of the factor.
    pub fn ln(self) -> f64 {
        f64::from(self.exponent) * std::f64::consts::LN_2
    }
}

impl Matrix<'_> {
    /// The longer side.
    pub fn long(&self) -> usize {
        self.rows.max(self.cols)
    }

    /// The shorter side: how many singular values there are.
    pub fn short(&self) -> usize {
        self.rows.min(self.cols)
    }

    /// The largest magnitude; `None` where a number is not finite.
    pub fn largest(&self) -> Option<f64> {
        let mut largest = 0f64;
        let mut sound = true;
        let mut buffer = [0f64; 1024];
        for bytes in self.bytes.chunks(1024 * self.float.size()) {
            let values = &mut buffer[..bytes.len() / self.float.size()];
            decode(self.float, bytes, values);
            for value in values.iter() {
                sound &= value.is_finite();
                largest = if value.abs() > largest { value.abs() } else { largest };
            }
        }
        sound.then_some(largest)
    }

    /// Vectors `from..from + out.len() / short()` along the long side, each `short()` numbers times `scale`,
    /// one after another. A matrix and its transpose, unless they are square, give the same numbers in the same
    /// places, and so the same condition number to the bit.
    pub fn panel(&self, from: usize, scale: Scale, out: &mut [f64]) {
        let n = self.short();
        let (size, count) = (self.float.size(), out.len() / n.max(1));
        if self.rows >= self.cols {
            decode(self.float, &self.bytes[from * n * size..][..count * n * size], out);
        } else {
            // Eight rows at a time: a cache line of each vector is written whole.
            let mut rows = vec![0f64; 8 * count];
            for i in (0..n).step_by(8) {
                let tall = (n - i).min(8);
                for (r, row) in rows.chunks_exact_mut(count).take(tall).enumerate() {
                    let start = ((i + r) * self.cols + from) * size;
                    decode(self.float, &self.bytes[start..][..count * size], row);
                }
                for k in 0..count {
                    for r in 0..tall {
                        out[k * n + i + r] = rows[r * count + k];
                    }
                }
            }
        }
        out.iter_mut().for_each(|v| *v = scale.apply(*v));
    }
}

/// Numbers of a file as f64, exactly.
fn decode(float: Float, bytes: &[u8], out: &mut [f64]) {
    match float {
        Float::F64 => {
            for (b, o) in bytes.chunks_exact(8).zip(out) {
                *o = f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
            }
        }
        Float::F32 => {
            for (b, o) in bytes.chunks_exact(4).zip(out) {
                *o = f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            }
        }
        Float::F16 => {
            for (b, o) in bytes.chunks_exact(2).zip(out) {
                *o = f64::from(half::f16::from_le_bytes([b[0], b[1]]));
            }
        }
        Float::Bf16 => {
            for (b, o) in bytes.chunks_exact(2).zip(out) {
                *o = f64::from(f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16));
            }
        }
    }
}
