//! Attention of one new token a row to the cached keys and values of that row, on a CPU: what decoding does in every
//! layer. torch's kernel is made for many queries and takes up to three times as long for one (dev/LOG.md).

use crate::loss::{exp, has_avx2, Logit};
use crate::rowwise::dot;
use crate::threads::for_each;

const WORK_OF_A_PART: usize = 1 << 16; // numbers of k

/// How k and v hold positions of `dim` numbers: row r's position p for key head h is at r * row_stride + h *
/// head_stride + p * dim. There are `heads` queries a row for `kv_heads` key heads.
#[derive(Clone, Copy)]
pub struct Shape {
    pub heads: usize,
    pub kv_heads: usize,
    pub row_stride: usize,
    pub head_stride: usize,
    pub dim: usize,
}

/// The tensors, or a part of them: q and out (pairs of a row and a head, dim), from pair `first` on.
pub struct Tensors<'a, L> {
    pub q: &'a [L],
    pub k: &'a [L],
    pub v: &'a [L],
    pub out: &'a mut [L],
    pub first: usize,
}

#[inline(always)]
fn attend_generic<L: Logit>(t: Tensors<L>, lengths: &[usize], shape: Shape) {
    let Shape { heads, kv_heads, row_stride, head_stride, dim } = shape;
    let (mut scores, mut sums) = (Vec::new(), vec![0f32; dim]);
    for (i, (q, out)) in t.q.chunks_exact(dim).zip(t.out.chunks_exact_mut(dim)).enumerate() {
        let (row, head) = ((t.first + i) / heads, (t.first + i) % heads);
        let start = row * row_stride + head * kv_heads / heads * head_stride; // heads may share keys and values
        let (k, v) = (&t.k[start..start + lengths[row] * dim], &t.v[start..start + lengths[row] * dim]);
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

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn attend_avx2<L: Logit>(t: Tensors<L>, lengths: &[usize], shape: Shape) {
    attend_generic(t, lengths, shape)
}

fn attend_dispatched<L: Logit>(t: Tensors<L>, lengths: &[usize], shape: Shape) {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        return unsafe { attend_avx2(t, lengths, shape) }; // safe: the processor has both
    }
    attend_generic(t, lengths, shape)
}

/// out = softmax(q k' / sqrt(dim)) v for every row and head, over the first lengths[row] positions.
pub fn attend<L: Logit>(t: Tensors<L>, lengths: &[usize], shape: Shape, num_threads: usize) {
    let pairs = WORK_OF_A_PART.div_ceil(1 + shape.dim * lengths.iter().max().copied().unwrap_or(0));
    let (k, v, share) = (t.k, t.v, pairs * shape.dim);
    let parts = t.q.chunks(share).zip(t.out.chunks_mut(share)).enumerate();
    for_each(parts, num_threads, |(i, (q, out))| {
        attend_dispatched(Tensors { q, k, v, out, first: i * pairs }, lengths, shape)
    });
}
