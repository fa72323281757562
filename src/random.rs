//! Counter-based random numbers: Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
//! easy as 1, 2, 3"). A draw is a pure function of (seed, stream, counter), so that the same seed
//! gives the same bytes whatever the number of threads and wherever a run is resumed.

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// One Philox 4x32-10 block: ten rounds over a 128-bit counter under a 64-bit key.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(MULTIPLIER[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIER[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// A stream of random numbers, addressed by a seed, a name and indices.
#[derive(Debug, Clone)]
pub struct Random {
    key: [u32; 2],
    stream: u64,
    counter: u64,
    block: [u32; 4],
    used: usize,
}

/// The number of the stream called `name` at `indices`: FNV-1a over both.
pub(crate) fn number_of(name: &str, indices: &[u64]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut eat = |byte: u8| hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    name.bytes().for_each(&mut eat);
    for index in indices {
        index.to_le_bytes().into_iter().for_each(&mut eat);
    }
    hash
}

impl Random {
    /// The stream called `name` under `seed`. `indices` address streams within it, such as
    /// `[epoch, sample]`: each combination is independent of every other.
    pub fn new(seed: u64, name: &str, indices: &[u64]) -> Self {
        let stream = number_of(name, indices);
        Random { key: [seed as u32, (seed >> 32) as u32], stream, counter: 0, block: [0; 4], used: 4 }
    }

    /// The next 32 random bits.
    pub fn bits(&mut self) -> u32 {
        if self.used == 4 {
            let (c, s) = (self.counter, self.stream);
            self.block = philox([c as u32, (c >> 32) as u32, s as u32, (s >> 32) as u32], self.key);
            self.counter += 1;
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// Uniform in `[0, 1)`, a multiple of 2^-24.
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 8) as f32 / (1 << 24) as f32
    }

    /// Uniform in `[low, high)`.
    pub fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.uniform()
    }

    /// Uniform in `0..n`, without bias (Lemire's multiply and reject); 0 where `n` is 0.
    pub fn below(&mut self, n: u32) -> u32 {
        if n == 0 {
            return 0;
        }
        let floor = n.wrapping_neg() % n;
        loop {
            let product = u64::from(self.bits()) * u64::from(n);
            if product as u32 >= floor {
                return (product >> 32) as u32;
            }
        }
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f32) -> bool {
        self.uniform() < p
    }

    /// A standard normal draw (Box and Muller).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - f64::from(self.uniform())).ln()).sqrt();
        let angle = std::f64::consts::TAU * f64::from(self.uniform());
        (radius * angle.cos()) as f32
    }

    /// A normal draw of standard deviation `std`, redrawn until it lies within two of them.
    pub fn truncated_normal(&mut self, std: f32) -> f32 {
        loop {
            let draw = self.normal();
            if draw.abs() <= 2.0 {
                return draw * std;
            }
        }
    }

    /// The logarithm of a draw from Gamma(shape, 1) (Marsaglia and Tsang 2000); of shapes below 1 by way
    /// of one more, as a logarithm since small shapes underflow.
    fn ln_gamma_draw(&mut self, shape: f64) -> f64 {
        let boosted = if shape < 1.0 { shape + 1.0 } else { shape };
        let d = boosted - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        let ln = loop {
            let x = f64::from(self.normal());
            let v = (1.0 + c * x).powi(3);
            let u = 1.0 - f64::from(self.uniform());
            if v > 0.0 && u.ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                break (d * v).ln();
            }
        };
        match shape < 1.0 {
            true => ln + (1.0 - f64::from(self.uniform())).ln() / shape,
            false => ln,
        }
    }

    /// A draw from Beta(alpha, alpha), `alpha` above 0: in `[0, 1]`, mean one half.
    pub fn beta(&mut self, alpha: f64) -> f64 {
        let alpha = alpha.max(1e-9); // as good as a coin already; the logarithms stay finite
        let (a, b) = (self.ln_gamma_draw(alpha), self.ln_gamma_draw(alpha));
        1.0 / (1.0 + (b - a).exp())
    }

    /// A random order of `0..n` (Fisher and Yates).
    pub fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i as u32 + 1) as usize);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers published with Random123 1.09 (`kat_vectors`).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn streams_differ_and_repeat() {
        let draw = |seed, name: &str, indices: &[u64]| Random::new(seed, name, indices).bits();
        assert_eq!(draw(1, "order", &[2]), draw(1, "order", &[2]));
        assert_ne!(draw(1, "order", &[2]), draw(1, "order", &[3]));
        assert_ne!(draw(1, "order", &[2]), draw(2, "order", &[2]));
        assert_ne!(draw(1, "order", &[2]), draw(1, "crop", &[2]));
    }

    /// Beta(a, a) has mean 1/2 and variance 1 / (8 a + 4).
    #[test]
    fn beta_moments() {
        for alpha in [0.2, 0.8, 1.0, 4.0] {
            let mut r = Random::new(7, "beta", &[]);
            let draws: Vec<f64> = (0..20_000).map(|_| r.beta(alpha)).collect();
            assert!(draws.iter().all(|d| (0.0..=1.0).contains(d)));
            let mean = draws.iter().sum::<f64>() / 20_000.0;
            let variance = draws.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / 20_000.0;
            let expected = 1.0 / (8.0 * alpha + 4.0);
            assert!((mean - 0.5).abs() < 0.01, "{alpha}: {mean}");
            assert!((variance / expected - 1.0).abs() < 0.05, "{alpha}: {variance} {expected}");
        }
        // So small that both gammas underflow: still 0 or 1.
        assert!((0..100).all(|i| Random::new(1, "tiny", &[i]).beta(1e-300).is_finite()));
    }

    #[test]
    fn moments_and_bounds() {
        let mut r = Random::new(7, "test", &[]);
        let n = 100_000;
        let draws: Vec<f32> = (0..n).map(|_| r.normal()).collect();
        let mean = draws.iter().sum::<f32>() / n as f32;
        let variance = draws.iter().map(|d| (d - mean).powi(2)).sum::<f32>() / n as f32;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
        assert!((0..n).all(|_| r.truncated_normal(0.5).abs() <= 1.0));
        let mut seen = [0u32; 7];
        (0..n).for_each(|_| seen[r.below(7) as usize] += 1);
        assert!(seen.iter().all(|&c| (c as f32 / n as f32 - 1.0 / 7.0).abs() < 0.01), "{seen:?}");
        let mut order = r.permutation(1000);
        assert_ne!(order[..5], [0, 1, 2, 3, 4]);
        order.sort_unstable();
        assert!(order.iter().enumerate().all(|(i, &o)| i as u32 == o));
    }
}
