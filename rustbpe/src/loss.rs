//! The loss of a language model's head on a CPU, with its gradient: softmax cross-entropy of logits that are capped by
//! c * tanh(x / c), in one pass over each row while it is in the cache. It has nothing to do with BPE; it is here
//! because torch takes nine passes for it, a quarter of training a d4 with 32,768 tokens, and this is the one native
//! extension.
//!
//! With s = 1 / (1 + exp(2x / c)) the capped logit is c - 2c s and its derivative is 4 s (1 - s). The constant c drops
//! out of the softmax, and exp(-2c s) <= 1 needs no maximum to be subtracted first. Of logits in bfloat16, which has
//! 65,536 numbers, both are looked up.

use crate::threads::for_each;

/// Numbers as the matrix product leaves them: float32, or bfloat16, the upper half of one.
pub trait Logit: Copy + Send + Sync {
    fn to_f32(self) -> f32;
    fn from_f32(x: f32) -> Self;
}

impl Logit for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
}

#[derive(Clone, Copy)]
pub struct Bf16(pub u16);

impl Logit for Bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.0 as u32) << 16)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Bf16 {
        let bits = x.to_bits();
        Bf16(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) as u16) // to nearest, ties to even; a quiet NaN stays one
    }
}

/// exp(x) for -87 < x < 88, to a few units in the last place: 2^n times a polynomial in what is left, |r| <= ln(2) / 2.
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

/// s of a raw logit, and its term in the softmax's sum, exp(-2c s).
#[inline(always)]
fn terms(x: f32, cap: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + exp((x * (2.0 / cap)).clamp(-80.0, 80.0)));
    (s, exp(-2.0 * cap * s))
}

/// Rows, or a part of them: their logits (overwritten by the gradient), targets, weights and losses.
pub struct Rows<'a, L> {
    pub logits: &'a mut [L],
    pub targets: &'a [i64],
    pub weights: &'a [f32],
    pub losses: &'a mut [f32],
}

const WORK_OF_A_PART: usize = 1 << 18; // logits
const LANES: usize = 32; // partial sums: enough that no addition waits for the one before

/// losses[i] = weights[i] * cross-entropy(row i, targets[i]), and each row of logits becomes its gradient.
#[inline(always)]
fn rows_generic<L: Logit>(rows: Rows<L>, cap: f32) {
    let width = rows.logits.len() / rows.losses.len();
    let (mut s, mut p) = (vec![0f32; width], vec![0f32; width]);
    for (i, row) in rows.logits.chunks_exact_mut(width).enumerate() {
        let (target, weight) = (rows.targets[i] as usize, rows.weights[i]);
        for ((x, s), p) in row.iter().zip(&mut s).zip(&mut p) {
            (*s, *p) = terms(x.to_f32(), cap);
        }
        let mut sums = [0f32; LANES];
        let (chunks, tail) = (p.chunks_exact(LANES), p.chunks_exact(LANES).remainder());
        for chunk in chunks {
            for (sum, p) in sums.iter_mut().zip(chunk) {
                *sum += p;
            }
        }
        let total = sums.iter().chain(tail).sum::<f32>();
        rows.losses[i] = weight * (total.ln() + 2.0 * cap * s[target]);
        let scale = 4.0 * weight / total;
        for ((x, s), p) in row.iter_mut().zip(&s).zip(&p) {
            *x = L::from_f32(p * scale * (s * (1.0 - s)));
        }
        let slope = s[target] * (1.0 - s[target]);
        row[target] = L::from_f32((p[target] * scale - 4.0 * weight) * slope);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn rows_avx2<L: Logit>(rows: Rows<L>, cap: f32) {
    rows_generic(rows, cap)
}

#[cfg(target_arch = "x86_64")]
pub fn has_avx2() -> bool {
    std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma")
}

fn rows_dispatched<L: Logit>(rows: Rows<L>, cap: f32) {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        return unsafe { rows_avx2(rows, cap) }; // safe: the processor has both
    }
    rows_generic(rows, cap)
}

/// The same for all rows of logits in float32, shared out to threads.
pub fn loss_of_f32(rows: Rows<f32>, cap: f32, num_threads: usize) {
    share_out(rows, num_threads, |rows| rows_dispatched(rows, cap))
}

/// The same for logits in bfloat16. A table for all of them takes as long to make as 65,536 logits to compute.
pub fn loss_of_bf16(rows: Rows<Bf16>, cap: f32, num_threads: usize) {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() && rows.logits.len() > 16 * table::SIZE {
        let table = unsafe { table::Table::new(cap) }; // safe: the processor has both
        return share_out(rows, num_threads, |rows| unsafe { table.rows(rows) });
    }
    share_out(rows, num_threads, |rows| rows_dispatched(rows, cap))
}

fn share_out<L: Logit>(rows: Rows<L>, num_threads: usize, work: impl Fn(Rows<L>) + Sync) {
    let count = rows.losses.len();
    if count == 0 {
        return;
    }
    let (width, share) = (rows.logits.len() / count, (WORK_OF_A_PART * count).div_ceil(rows.logits.len()));
    let parts = rows.logits.chunks_mut(share * width).zip(rows.losses.chunks_mut(share));
    let parts = parts.zip(rows.targets.chunks(share)).zip(rows.weights.chunks(share));
    for_each(parts, num_threads, |(((logits, losses), targets), weights)| {
        work(Rows { logits, targets, weights, losses })
    });
}

/// The same bits in two thirds to three quarters of the time that computing them takes (dev/LOG.md): eight numbers come
/// with one instruction, and those that occur fit in the cache.
#[cfg(target_arch = "x86_64")]
mod table {
    use super::{terms, Bf16, Logit, Rows, LANES};
    use std::arch::x86_64::{_mm256_cvtepu16_epi32, _mm256_i32gather_ps, _mm256_storeu_ps, _mm_loadu_si128};

    pub const SIZE: usize = 1 << 16;

    /// By the bits of a raw logit: its term in the softmax's sum, and s (1 - s), a quarter of the capped logit's slope.
    pub struct Table {
        cap: f32,
        p: Vec<f32>,
        slopes: Vec<f32>,
    }

    impl Table {
        #[target_feature(enable = "avx2,fma")]
        pub unsafe fn new(cap: f32) -> Self {
            let (mut p, mut slopes) = (vec![0.0; SIZE], vec![0.0; SIZE]);
            for (bits, (p, slope)) in p.iter_mut().zip(&mut slopes).enumerate() {
                let s;
                (s, *p) = terms(Bf16(bits as u16).to_f32(), cap);
                *slope = s * (1.0 - s);
            }
            Table { cap, p, slopes }
        }

        /// As `rows_generic`. Needs AVX2.
        #[target_feature(enable = "avx2,fma")]
        pub unsafe fn rows(&self, rows: Rows<Bf16>) {
            let width = rows.logits.len() / rows.losses.len();
            for (i, row) in rows.logits.chunks_exact_mut(width).enumerate() {
                let (target, weight) = (rows.targets[i] as usize, rows.weights[i]);
                let (s, p) = terms(row[target].to_f32(), self.cap);
                let mut sums = [0f32; LANES];
                let (chunks, tail) = (row.chunks_exact(LANES), row.chunks_exact(LANES).remainder());
                for chunk in chunks {
                    for (sum, p) in sums.iter_mut().zip(look_up(&self.p, chunk)) {
                        *sum += p;
                    }
                }
                let tail = tail.iter().map(|x| &self.p[x.0 as usize]);
                let total = sums.iter().chain(tail).sum::<f32>();
                rows.losses[i] = weight * (total.ln() + 2.0 * self.cap * s);
                let scale = 4.0 * weight / total;
                let mut chunks = row.chunks_exact_mut(LANES);
                for chunk in &mut chunks {
                    let (p, slopes) = (look_up(&self.p, chunk), look_up(&self.slopes, chunk));
                    for ((x, p), slope) in chunk.iter_mut().zip(p).zip(slopes) {
                        *x = Bf16::from_f32(p * scale * slope);
                    }
                }
                for x in chunks.into_remainder() {
                    *x = Bf16::from_f32(self.p[x.0 as usize] * scale * self.slopes[x.0 as usize]);
                }
                row[target] = Bf16::from_f32((p * scale - 4.0 * weight) * (s * (1.0 - s)));
            }
        }
    }

    /// table[x] for LANES numbers x. Any 16 bits are an index into the SIZE values of `table`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn look_up(table: &[f32], chunk: &[Bf16]) -> [f32; LANES] {
        let mut found = [0f32; LANES];
        for (eight, x) in found.chunks_exact_mut(8).zip(chunk.chunks_exact(8)) {
            let indices = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast()));
            _mm256_storeu_ps(eight.as_mut_ptr(), _mm256_i32gather_ps::<4>(table.as_ptr(), indices));
        }
        found
    }
}
