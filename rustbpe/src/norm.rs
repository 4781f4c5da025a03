//! RMSNorm without a weight, for the few rows that a model decodes at once on a CPU: torch takes half a dozen passes,
//! and as many times the few microseconds that it takes to begin one, for what is done here while a row is in the cache.

use crate::loss::Logit;

const LANES: usize = 16; // partial sums, which a compiler adds side by side

/// Each row of `width` numbers of x, divided by the root of its mean square (plus eps), to the same row of y.
pub fn rms_norm<L: Logit>(x: &[L], y: &mut [L], width: usize, eps: f32) {
    for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
        let mut sums = [0f32; LANES];
        for chunk in x.chunks(LANES) {
            for (sum, x) in sums.iter_mut().zip(chunk) {
                *sum += x.to_f32() * x.to_f32();
            }
        }
        let scale = 1.0 / (sums.iter().sum::<f32>() / width as f32 + eps).sqrt();
        for (x, y) in x.iter().zip(y) {
            *y = L::from_f32(x.to_f32() * scale);
        }
    }
}
