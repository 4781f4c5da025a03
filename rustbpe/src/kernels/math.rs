//! Floating-point formats and sums over rows. All of it is inlined into functions that `multiversion` compiles twice,
//! with and without AVX2; the results have the same bits.

use super::tensor::Element;

/// Partial sums: enough that no addition has to wait for the one before.
pub const LANES: usize = 32;

/// A number that is computed with in float32: float32 itself, or bfloat16.
pub trait Float: Element {
    fn to_f32(self) -> f32;
    fn from_f32(x: f32) -> Self;
}

impl Float for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
}

/// bfloat16: the upper half of a float32. The crate `half` has it, too, but its conversions branch on NaN: norm and ReLU^2
/// of bfloat16 took 1.7 to 2 times as long with them, causal softmax 1.1, the loss 1.2 times.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Float for Bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.0 as u32) << 16)
    }

    /// To nearest, ties to even. A quiet NaN stays a NaN.
    #[inline(always)]
    fn from_f32(x: f32) -> Bf16 {
        let bits = x.to_bits();
        let is_odd = (bits >> 16) & 1;
        Bf16(((bits + 0x7FFF + is_odd) >> 16) as u16)
    }
}

/// exp(x) for -87 < x < 88, to a few units in the last place: 2^n times a polynomial in the rest r, |r| <= ln(2) / 2.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: added, it leaves the nearest integer in the lowest bits
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-1.428_606_8e-6, n.mul_add(-0.693_145_75, x)); // ln(2) in two parts
    let mut p = 1.0 / 720.0; // Taylor's series to the sixth power
    for coefficient in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = r.mul_add(p, coefficient);
    }
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

#[inline(always)]
pub fn dot<A: Float, B: Float>(a: &[A], b: &[B]) -> f32 {
    let a = a.chunks_exact(LANES);
    let b = b.chunks_exact(LANES);
    let mut rest = 0f32;
    for (a, b) in a.remainder().iter().zip(b.remainder()) {
        rest = a.to_f32().mul_add(b.to_f32(), rest);
    }
    let mut sums = [0f32; LANES];
    for (a, b) in a.zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum = a.to_f32().mul_add(b.to_f32(), *sum);
        }
    }
    add_halves(sums) + rest
}

#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder().iter().sum::<f32>();
    add_halves(lane_sums(chunks)) + rest
}

/// Of each lane, the sum over all chunks.
#[inline(always)]
pub fn lane_sums(chunks: std::slice::ChunksExact<f32>) -> [f32; LANES] {
    let mut sums = [0f32; LANES];
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += x;
        }
    }
    sums
}

/// The sum of the sums, by halves: one after the other, each addition would wait for the one before.
#[inline(always)]
fn add_halves(mut sums: [f32; LANES]) -> f32 {
    for half in [16, 8, 4, 2, 1] {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
    }
    sums[0]
}

#[inline(always)]
pub fn largest<L: Float>(x: &[L]) -> f32 {
    let chunks = x.chunks_exact(LANES);
    let mut most = [f32::NEG_INFINITY; LANES];
    for (most, x) in most.iter_mut().zip(chunks.remainder()) {
        *most = x.to_f32();
    }
    for chunk in chunks {
        for (most, x) in most.iter_mut().zip(chunk) {
            let x = x.to_f32();
            *most = if x > *most { x } else { *most };
        }
    }
    most.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b))
}
