//! The loss of a language model's head with its gradient: softmax cross-entropy of logits that are capped by
//! c * tanh(x / c), in one pass over each row while it is in the cache. torch takes nine passes for it, a quarter of
//! training a d4 with 32,768 tokens.
//!
//! With s = 1 / (1 + exp(2x / c)) the capped logit is c - 2c s and its derivative is 4 s (1 - s). The constant c drops
//! out of the softmax, and exp(-2c s) <= 1 needs no maximum to be subtracted first. Of logits in bfloat16, which has
//! 65,536 numbers, both are looked up.

use super::math::{exp, lane_sums, Bf16, Float, LANES};
use super::threads::for_each;
use multiversion::multiversion;

const WORK_OF_A_PART: usize = 1 << 18; // logits

/// Rows, or a part of them: their logits (overwritten by the gradient), targets, weights and losses.
pub struct Rows<'a, L> {
    pub logits: &'a mut [L],
    pub targets: &'a [i64],
    pub weights: &'a [f32],
    pub losses: &'a mut [f32],
}

/// s of a raw logit, and its term in the softmax's sum, exp(-2c s).
#[inline(always)]
fn terms(x: f32, cap: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + exp((x * (2.0 / cap)).clamp(-80.0, 80.0)));
    (s, exp(-2.0 * cap * s))
}

/// Where s and p of a logit come from.
trait Source<L>: Sync {
    fn get(&self, x: L) -> (f32, f32);
}

struct Computed {
    cap: f32,
}

impl<L: Float> Source<L> for Computed {
    #[inline(always)]
    fn get(&self, x: L) -> (f32, f32) {
        terms(x.to_f32(), self.cap)
    }
}

/// By the bits of a raw bfloat16 logit
struct Table(Box<[(f32, f32); Table::SIZE]>);

impl Table {
    const SIZE: usize = 1 << 16;
}

impl Source<Bf16> for Table {
    #[inline(always)]
    fn get(&self, x: Bf16) -> (f32, f32) {
        self.0[x.0 as usize]
    }
}

#[multiversion(targets("x86_64+avx2+fma"))]
fn make_table(cap: f32) -> Table {
    let mut table = vec![(0.0, 0.0); Table::SIZE];
    for (bits, entry) in table.iter_mut().enumerate() {
        *entry = terms(Bf16(bits as u16).to_f32(), cap);
    }
    Table(table.try_into().unwrap())
}

/// losses[i] = weights[i] * cross-entropy(row i, targets[i]), and each row of logits becomes its gradient.
#[multiversion(targets("x86_64+avx2+fma"))]
fn loss_part<L: Float, S: Source<L>>(rows: Rows<L>, source: &S, cap: f32) {
    let width = rows.logits.len() / rows.losses.len();
    let mut s = vec![0f32; width];
    let mut p = vec![0f32; width];
    for (i, row) in rows.logits.chunks_exact_mut(width).enumerate() {
        let target = rows.targets[i] as usize;
        let weight = rows.weights[i];
        for ((x, s), p) in row.iter().zip(&mut s).zip(&mut p) {
            (*s, *p) = source.get(*x);
        }
        let chunks = p.chunks_exact(LANES);
        let tail = chunks.remainder();
        let total = lane_sums(chunks).iter().chain(tail).sum::<f32>();
        rows.losses[i] = weight * (total.ln() + 2.0 * cap * s[target]);
        let scale = 4.0 * weight / total;
        for ((x, s), p) in row.iter_mut().zip(&s).zip(&p) {
            *x = L::from_f32(p * scale * (s * (1.0 - s)));
        }
        let slope = s[target] * (1.0 - s[target]);
        row[target] = L::from_f32((p[target] * scale - 4.0 * weight) * slope);
    }
}

/// The same for all rows of logits in float32, shared out to threads.
pub fn loss_of_f32(rows: Rows<f32>, cap: f32, num_threads: usize) {
    share_out(rows, num_threads, |rows| loss_part(rows, &Computed { cap }, cap))
}

/// The same for logits in bfloat16. A table for all of them takes as long to make as 65,536 logits to compute.
pub fn loss_of_bf16(rows: Rows<Bf16>, cap: f32, num_threads: usize) {
    if rows.logits.len() > 16 * Table::SIZE {
        let table = make_table(cap);
        return share_out(rows, num_threads, |rows| loss_part(rows, &table, cap));
    }
    share_out(rows, num_threads, |rows| loss_part(rows, &Computed { cap }, cap))
}

fn share_out<L: Float>(rows: Rows<L>, num_threads: usize, work: impl Fn(Rows<L>) + Sync) {
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
