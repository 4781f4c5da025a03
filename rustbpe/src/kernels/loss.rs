//! The loss of a language model's head with its gradient: softmax cross-entropy of logits that are capped by
//! c * tanh(x / c), in one pass over each row while it is in the cache. torch takes nine passes for it, a quarter of
//! training a d4 with 32,768 tokens.
//!
//! With s = 1 / (1 + exp(2x / c)) the capped logit is c - 2c s and its derivative is 4 s (1 - s). The constant c drops
//! out of the softmax, and p = exp(-2c s) <= 1 needs no maximum to be subtracted first.

use super::math::{exp, lane_sums, Float, LANES};
use super::tensor::{Dtype, Tensor};
use super::threads::for_each;
use multiversion::multiversion;

const WORK_OF_A_PART: usize = 1 << 18; // logits

/// s and p of each bfloat16 number, by its bits.
type Table = [(f32, f32); TABLE_SIZE];
const TABLE_SIZE: usize = 1 << 16;

/// losses (n,) = weights (n,) * cross-entropy of logits (n, V) for targets (n,); the logits become their gradient.
/// tensors: logits, targets, weights, losses.
pub fn capped_cross_entropy<L: Float>(tensors: [Tensor; 4], cap: f32, num_threads: usize) -> Result<(), String> {
    let [mut logits, targets, weights, mut losses] = tensors;
    let [_, _, num_rows, width] = logits.shape;
    if [targets.shape, weights.shape, losses.shape] != [[1, 1, 1, num_rows]; 3] {
        return Err(format!("targets, weights and losses must have {num_rows} elements, one for each row of logits"));
    }
    let losses = losses.slice_mut::<f32>(&[&logits, &targets, &weights])?;
    let logits = logits.slice_mut::<L>(&[&targets, &weights])?;
    let targets = targets.slice::<i64>()?;
    let weights = weights.slice::<f32>()?;
    if let Some(target) = targets.iter().find(|&&target| target as usize >= width) {
        return Err(format!("target {target} is outside the vocabulary of {width} tokens"));
    }
    if logits.is_empty() {
        return Ok(());
    }
    // A table takes as long to make as 65,536 logits to compute
    let is_worth_a_table = L::DTYPE == Dtype::Bfloat16 && logits.len() > 16 * TABLE_SIZE;
    let table = is_worth_a_table.then(|| make_table(cap));
    let share = WORK_OF_A_PART.div_ceil(width);
    let parts = logits.chunks_mut(share * width).zip(losses.chunks_mut(share));
    let parts = parts.zip(targets.chunks(share)).zip(weights.chunks(share));
    for_each(parts, num_threads, |(((logits, losses), targets), weights)| {
        run_part(logits, targets, weights, losses, cap, table.as_deref())
    });
    Ok(())
}

#[multiversion(targets("x86_64+avx2+fma"))]
fn run_part<L: Float>(
    logits: &mut [L], targets: &[i64], weights: &[f32], losses: &mut [f32], cap: f32, table: Option<&Table>,
) {
    let width = logits.len() / losses.len();
    let mut s = vec![0f32; width];
    let mut p = vec![0f32; width];
    for (i, row) in logits.chunks_exact_mut(width).enumerate() {
        match table {
            Some(table) => look_up(row, table, &mut s, &mut p),
            None => compute(row, cap, &mut s, &mut p),
        }
        let chunks = p.chunks_exact(LANES);
        let tail = chunks.remainder();
        let total = lane_sums(chunks).iter().chain(tail).sum::<f32>();
        let target = targets[i] as usize;
        let weight = weights[i];
        losses[i] = weight * (total.ln() + 2.0 * cap * s[target]);
        let scale = 4.0 * weight / total;
        for ((x, s), p) in row.iter_mut().zip(&s).zip(&p) {
            *x = L::from_f32(p * scale * (s * (1.0 - s)));
        }
        let slope = s[target] * (1.0 - s[target]);
        row[target] = L::from_f32((p[target] * scale - 4.0 * weight) * slope);
    }
}

/// s and p of the raw logits of a row. A function of its own: the constants of `exp` need all of the registers.
#[multiversion(targets("x86_64+avx2+fma"))]
fn compute<L: Float>(row: &[L], cap: f32, s: &mut [f32], p: &mut [f32]) {
    for ((x, s), p) in row.iter().zip(s).zip(p) {
        (*s, *p) = terms(x.to_f32(), cap);
    }
}

/// The same by the upper half of the bits, which is all there is of a bfloat16.
#[inline(always)]
fn look_up<L: Float>(row: &[L], table: &Table, s: &mut [f32], p: &mut [f32]) {
    for ((x, s), p) in row.iter().zip(s).zip(p) {
        (*s, *p) = table[(x.to_f32().to_bits() >> 16) as usize];
    }
}

/// s and p of a raw logit.
#[inline(always)]
fn terms(x: f32, cap: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + exp((x * (2.0 / cap)).clamp(-80.0, 80.0)));
    (s, exp(-2.0 * cap * s))
}

#[multiversion(targets("x86_64+avx2+fma"))]
fn make_table(cap: f32) -> Box<Table> {
    let mut table = Box::new([(0.0, 0.0); TABLE_SIZE]);
    for (bits, entry) in table.iter_mut().enumerate() {
        *entry = terms(f32::from_bits((bits as u32) << 16), cap);
    }
    table
}
