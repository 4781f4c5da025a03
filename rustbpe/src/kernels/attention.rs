//! Attention of one new token a row to the cached keys and values of that row: what decoding does in every layer.
//! torch's kernel is made for many queries and takes up to three times as long for one (dev/LOG.md).

use super::math::{dot, exp, Float};
use super::tensor::Rows;
use super::threads::for_each;
use multiversion::multiversion;

const WORK_OF_A_PART: usize = 1 << 16; // elements of k

/// What is read: q (B, H, D) contiguous, and of each row and head of k and v a block of positions, of which the first
/// `lengths[row]` count.
#[derive(Clone, Copy)]
pub struct Inputs<'a, L> {
    pub q: &'a [L],
    pub k: Rows<'a, L>,
    pub v: Rows<'a, L>,
    pub lengths: &'a [usize],
    pub heads: usize,
    pub kv_heads: usize, // heads may share keys and values
    pub dim: usize,
}

/// The queries of `out`, which begin with number `first`.
#[multiversion(targets("x86_64+avx2+fma"))]
fn attend_part<L: Float>(inputs: Inputs<L>, out: &mut [L], first: usize) {
    let Inputs { q, k, v, lengths, heads, kv_heads, dim } = inputs;
    let mut scores = Vec::new();
    let mut sums = vec![0f32; dim];
    let queries = q[first * dim..].chunks_exact(dim);
    for (i, (q, out)) in queries.zip(out.chunks_exact_mut(dim)).enumerate() {
        let row = (first + i) / heads;
        let head = (first + i) % heads;
        let block = [row, head * kv_heads / heads, 0];
        let k = &k.row(block)[..lengths[row] * dim];
        let v = &v.row(block)[..lengths[row] * dim];
        let q: Vec<f32> = q.iter().map(|x| x.to_f32() / (dim as f32).sqrt()).collect();
        scores.resize(lengths[row], 0f32);
        for (score, k) in scores.iter_mut().zip(k.chunks_exact(dim)) {
            *score = dot(&q, k); // a loop, not a closure, which would not be compiled for AVX2
        }
        let largest = scores.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        for score in &mut scores {
            *score = exp((*score - largest).max(-80.0)); // in a loop of its own, eight at a time
        }
        let total = scores.iter().sum::<f32>();
        sums.fill(0.0);
        for (p, v) in scores.iter().zip(v.chunks_exact(dim)) {
            for (sum, v) in sums.iter_mut().zip(v) {
                *sum = p.mul_add(v.to_f32(), *sum);
            }
        }
        for (out, sum) in out.iter_mut().zip(&sums) {
            *out = L::from_f32(sum / total);
        }
    }
}

/// out (B, H, D) = softmax(q k' / sqrt(D)) v.
pub fn attend<L: Float>(inputs: Inputs<L>, out: &mut [L], num_threads: usize) {
    if out.is_empty() {
        return;
    }
    let longest = inputs.lengths.iter().max().copied().unwrap_or(0);
    let num_queries = WORK_OF_A_PART.div_ceil(1 + inputs.dim * longest);
    let parts = out.chunks_mut(num_queries * inputs.dim).enumerate();
    for_each(parts, num_threads, |(i, out)| attend_part(inputs, out, i * num_queries));
}
