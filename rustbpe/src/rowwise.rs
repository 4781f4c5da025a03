//! What stands between the products of a layer, on a CPU: RMSNorm without a weight, with rotary positions where they
//! are wanted, ReLU^2, and the softmax of causal attention, each with its gradient. torch takes half a dozen passes
//! over memory for one, and as many times the few microseconds that it takes to begin a pass; here a row is done while
//! it is in the cache.

use crate::loss::{exp, Logit};
use crate::threads::for_each;
use std::ops::Range;

const LANES: usize = 32; // partial sums: enough that no addition waits for the one before
const WORK_OF_A_PART: usize = 1 << 15; // numbers: small, so that a thread that is held up holds nobody else up

/// Rows of numbers side by side in a tensor: row (b, t, h) begins at b * strides[0] + t * strides[1] + h * strides[2].
#[derive(Clone, Copy)]
pub struct Rows {
    pub address: usize, // not a pointer, so that threads can have it
    pub strides: [usize; 3],
}

impl Rows {
    fn start<L>(self, place: [usize; 3]) -> *mut L {
        let offset: usize = place.iter().zip(self.strides).map(|(index, stride)| index * stride).sum();
        (self.address as *mut L).wrapping_add(offset)
    }

    #[inline(always)]
    unsafe fn row<'a, L>(self, place: [usize; 3], width: usize) -> &'a [L] {
        std::slice::from_raw_parts(self.start(place), width)
    }

    #[inline(always)]
    unsafe fn row_mut<'a, L>(self, place: [usize; 3], width: usize) -> &'a mut [L] {
        std::slice::from_raw_parts_mut(self.start(place), width)
    }
}

#[derive(Clone, Copy)]
pub enum Op {
    Norm {
        eps: f32,
    },
    /// The pairs (i, i + width / 2) of row (b, t, h) turned by minus the angles of (b, t, 0), then the norm; the
    /// cosines and sines are float32.
    RotaryNorm {
        eps: f32,
        cos: Rows,
        sin: Rows,
    },
    ReluSquare,
    /// Of the first t + 1 numbers of row (b, t, h) times the scale; the others become 0. For the gradient, x is the
    /// softmax.
    CausalSoftmax {
        scale: f32,
    },
}

/// out = op(x) or, with the gradient dy by that, the gradient by x; sizes: (batch, tokens, heads).
#[derive(Clone, Copy)]
pub struct Task {
    pub op: Op,
    pub x: Rows,
    pub dy: Option<Rows>,
    pub out: Rows,
    pub sizes: [usize; 3],
    pub width: usize,
}

#[inline(always)]
pub fn dot<A: Logit, B: Logit>(a: &[A], b: &[B]) -> f32 {
    let (mut sums, mut rest) = ([0f32; LANES], 0f32);
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (a, b) in a.remainder().iter().zip(b.remainder()) {
        rest = a.to_f32().mul_add(b.to_f32(), rest);
    }
    for (a, b) in a.zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum = a.to_f32().mul_add(b.to_f32(), *sum);
        }
    }
    fold(sums) + rest
}

#[inline(always)]
fn add_up(numbers: &[f32]) -> f32 {
    let (mut sums, chunks) = ([0f32; LANES], numbers.chunks_exact(LANES));
    let rest = chunks.remainder().iter().sum::<f32>();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += x;
        }
    }
    fold(sums) + rest
}

#[inline(always)]
fn largest<L: Logit>(x: &[L]) -> f32 {
    let (mut most, chunks) = ([f32::NEG_INFINITY; LANES], x.chunks_exact(LANES));
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

/// The sum of the sums, by halves: one after the other, each addition would wait for the one before.
#[inline(always)]
fn fold(mut sums: [f32; LANES]) -> f32 {
    for half in [16, 8, 4, 2, 1] {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
    }
    sums[0]
}

/// out = scale * x, its pairs turned by minus the angles; sign -1: by the angles, which undoes it.
#[inline(always)]
fn turn<X: Logit, Y: Logit>(x: &[X], out: &mut [Y], angles: Option<(&[f32], &[f32])>, sign: f32, scale: f32) {
    let Some((cos, sin)) = angles else {
        for (out, x) in out.iter_mut().zip(x) {
            *out = Y::from_f32(x.to_f32() * scale);
        }
        return;
    };
    let ((x1, x2), (y1, y2)) = (x.split_at(x.len() / 2), out.split_at_mut(x.len() / 2));
    for ((((x1, x2), cos), sin), y) in x1.iter().zip(x2).zip(cos).zip(sin).zip(y1) {
        *y = Y::from_f32(scale * x1.to_f32().mul_add(*cos, sign * sin * x2.to_f32()));
    }
    for ((((x1, x2), cos), sin), y) in x1.iter().zip(x2).zip(cos).zip(sin).zip(y2) {
        *y = Y::from_f32(scale * x2.to_f32().mul_add(*cos, -sign * sin * x1.to_f32()));
    }
}

/// g: space for a row.
#[inline(always)]
fn norm_row<L: Logit>(
    x: &[L],
    dy: Option<&[L]>,
    out: &mut [L],
    angles: Option<(&[f32], &[f32])>,
    eps: f32,
    g: &mut [f32],
) {
    let width = x.len() as f32;
    let scale = 1.0 / (dot(x, x) / width + eps).sqrt(); // of the turned row as well
    let Some(dy) = dy else { return turn(x, out, angles, 1.0, scale) };
    turn(dy, g, angles, -1.0, scale);
    let along = dot(g, x) / width * scale * scale;
    for ((out, g), x) in out.iter_mut().zip(g).zip(x) {
        *out = L::from_f32(*g - along * x.to_f32());
    }
}

#[inline(always)]
fn relu(x: f32) -> f32 {
    if x < 0.0 {
        0.0
    } else {
        x // NaN, too, which f32::max would hide
    }
}

#[inline(always)]
fn relu_square_row<L: Logit>(x: &[L], dy: Option<&[L]>, out: &mut [L]) {
    if let Some(dy) = dy {
        for ((out, x), dy) in out.iter_mut().zip(x).zip(dy) {
            *out = L::from_f32(2.0 * relu(x.to_f32()) * dy.to_f32());
        }
    } else {
        for (out, x) in out.iter_mut().zip(x) {
            let x = relu(x.to_f32());
            *out = L::from_f32(x * x);
        }
    }
}

/// x, dy, out: the numbers that count. g: space for them.
#[inline(always)]
fn softmax_row<L: Logit>(x: &[L], dy: Option<&[L]>, out: &mut [L], scale: f32, g: &mut [f32]) {
    if let Some(dy) = dy {
        let mean = dot(x, dy);
        for ((out, p), dy) in out.iter_mut().zip(x).zip(dy) {
            *out = L::from_f32(scale * p.to_f32() * (dy.to_f32() - mean));
        }
    } else {
        let largest = largest(x);
        for (g, x) in g.iter_mut().zip(x) {
            *g = exp((scale * (x.to_f32() - largest)).clamp(-80.0, 0.0));
        }
        let share = 1.0 / add_up(g);
        for (out, g) in out.iter_mut().zip(g) {
            *out = L::from_f32(*g * share);
        }
    }
}

#[inline(always)]
unsafe fn run_generic<L: Logit>(task: Task, tokens: Range<usize>) {
    let Task { op, x, dy, out, sizes: [_, length, heads], width } = task;
    let mut g = vec![0f32; width];
    for (b, t) in tokens.map(|token| (token / length, token % length)) {
        for place in (0..heads).map(|h| [b, t, h]) {
            let (x, dy) = (x.row::<L>(place, width), dy.map(|dy| dy.row::<L>(place, width)));
            let out = out.row_mut::<L>(place, width);
            match op {
                Op::Norm { eps } => norm_row(x, dy, out, None, eps, &mut g),
                Op::RotaryNorm { eps, cos, sin } => {
                    let angles = (cos.row([b, t, 0], width / 2), sin.row([b, t, 0], width / 2));
                    norm_row(x, dy, out, Some(angles), eps, &mut g);
                }
                Op::ReluSquare => relu_square_row(x, dy, out),
                Op::CausalSoftmax { scale } => {
                    let (seen, future) = out.split_at_mut(t + 1);
                    softmax_row(&x[..t + 1], dy.map(|dy| &dy[..t + 1]), seen, scale, &mut g[..t + 1]);
                    future.fill(L::from_f32(0.0));
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn run_avx2<L: Logit>(task: Task, tokens: Range<usize>) {
    run_generic::<L>(task, tokens)
}

unsafe fn run_dispatched<L: Logit>(task: Task, tokens: Range<usize>) {
    #[cfg(target_arch = "x86_64")]
    if crate::loss::has_avx2() {
        return run_avx2::<L>(task, tokens);
    }
    run_generic::<L>(task, tokens)
}

/// Sound while the tensors hold the rows that the sizes say, `out` overlaps no other, and nobody else writes to them.
pub unsafe fn run<L: Logit>(task: Task, num_threads: usize) {
    let tokens = task.sizes[0] * task.sizes[1];
    let share = WORK_OF_A_PART.div_ceil((task.sizes[2] * task.width).max(1));
    for_each(0..tokens.div_ceil(share), num_threads, |part| {
        run_dispatched::<L>(task, part * share..tokens.min((part + 1) * share))
    });
}
