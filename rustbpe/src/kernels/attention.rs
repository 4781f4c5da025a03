//! Attention of one new token a row to the cached keys and values of that row: what decoding does in every layer.
//! torch's kernel is made for many queries and takes up to three times as long for one (dev/LOG.md).

use super::math::{dot, exp, Float};
use super::tensor::{Rows, Tensor};
use super::threads::for_each;
use multiversion::multiversion;

const WORK_OF_A_PART: usize = 1 << 16; // elements of k

/// out (B, H, 1, D) = softmax(q k' / sqrt(D)) v of q (B, H, 1, D) with k and v (B, H_kv, S, D) up to position
/// last (B, 1), or all of it.
pub fn attend<L: Float>(
    q: &Tensor, k: &Tensor, v: &Tensor, last: Option<&Tensor>, out: &mut Tensor, num_threads: usize,
) -> Result<(), String> {
    let [num_rows, heads, _, dim] = q.shape;
    let [_, kv_heads, positions, _] = k.shape;
    if out.shape != q.shape || q.shape[2] != 1 || kv_heads == 0 || heads % kv_heads != 0 {
        return Err(format!("q of shape {:?} does not fit k of shape {:?}", q.shape, k.shape));
    }
    let lengths = match last {
        Some(last) => last.slice::<i64>()?.iter().map(|&last| (last as usize).wrapping_add(1)).collect(),
        None => vec![positions; num_rows],
    };
    if lengths.len() != num_rows || lengths.iter().any(|length| !(1..=positions).contains(length)) {
        return Err(format!("{num_rows} queries attend to {lengths:?} positions of {positions}"));
    }
    let kv_shape = [num_rows, kv_heads, positions, dim];
    let inputs = Inputs { k: k.rows(kv_shape, 2)?, v: v.rows(kv_shape, 2)?, lengths: &lengths, heads, kv_heads };
    let queries = q.slice::<L>()?;
    let out = out.slice_mut::<L>(&[q, k, v])?;
    if out.is_empty() {
        return Ok(());
    }
    let longest = lengths.iter().max().copied().unwrap_or(0);
    let share = WORK_OF_A_PART.div_ceil(1 + dim * longest);
    let parts = queries.chunks(share * dim).zip(out.chunks_mut(share * dim)).enumerate();
    for_each(parts, num_threads, |(i, (q, out))| attend_part(inputs, q, out, dim, i * share));
    Ok(())
}

#[derive(Clone, Copy)]
struct Inputs<'a, L> {
    k: Rows<'a, L>, // a "row" has all positions of a head
    v: Rows<'a, L>,
    lengths: &'a [usize],
    heads: usize,
    kv_heads: usize,
}

/// Some queries, of which the first has number `first` among all rows' heads.
#[multiversion(targets("x86_64+avx2+fma"))]
fn attend_part<L: Float>(inputs: Inputs<L>, q: &[L], out: &mut [L], dim: usize, first: usize) {
    let Inputs { k, v, lengths, heads, kv_heads } = inputs;
    let mut scores = Vec::new();
    let mut sums = vec![0f32; dim];
    for (i, (q, out)) in q.chunks_exact(dim).zip(out.chunks_exact_mut(dim)).enumerate() {
        let row = (first + i) / heads;
        let head = (first + i) % heads;
        let place = [row, head * kv_heads / heads, 0]; // heads may share keys and values
        let k = &k.row(place)[..lengths[row] * dim];
        let v = &v.row(place)[..lengths[row] * dim];
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
