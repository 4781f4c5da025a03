//! What a layer does to rows between its matmuls: RMSNorm without a weight, with rotary positions where they are
//! wanted, ReLU^2, and the softmax of causal attention, each with its gradient. torch takes half a dozen passes over
//! memory for one, and a few microseconds to begin each; here a row is done while it is in the cache.

use super::math::{dot, exp, largest, sum, Float};
use super::tensor::{Rows, RowsMut};
use super::threads::for_each;
use multiversion::multiversion;

const WORK_OF_A_PART: usize = 1 << 15; // elements: small, so that a thread that is held up holds nobody else up

#[derive(Clone, Copy)]
pub enum Op {
    Norm { eps: f32 },
    ReluSquare,
    /// Of the first b + 1 elements of row (a, b, c) times the scale; the others become 0.
    CausalSoftmax { scale: f32 },
}

/// What an operation reads. With the gradient `dy` of its result it computes the gradient of x; of CausalSoftmax x is
/// then the result itself. With `angles`, the cosines and sines of half a row, Norm first rotates the pairs
/// (i, i + width / 2) of a row by minus the angles.
#[derive(Clone, Copy)]
pub struct Inputs<'a, L> {
    pub x: Rows<'a, L>,
    pub dy: Option<Rows<'a, L>>,
    pub angles: Option<[Rows<'a, f32>; 2]>,
}

/// out = scale * x, its pairs rotated by minus the angles; sign -1: by the angles, which undoes it.
#[inline(always)]
fn rotate<X: Float, Y: Float>(x: &[X], out: &mut [Y], angles: Option<[&[f32]; 2]>, sign: f32, scale: f32) {
    let Some([cos, sin]) = angles else {
        for (out, x) in out.iter_mut().zip(x) {
            *out = Y::from_f32(x.to_f32() * scale);
        }
        return;
    };
    let (x1, x2) = x.split_at(x.len() / 2);
    let (y1, y2) = out.split_at_mut(x.len() / 2);
    for ((((x1, x2), cos), sin), y) in x1.iter().zip(x2).zip(cos).zip(sin).zip(y1) {
        *y = Y::from_f32(scale * x1.to_f32().mul_add(*cos, sign * sin * x2.to_f32()));
    }
    for ((((x1, x2), cos), sin), y) in x1.iter().zip(x2).zip(cos).zip(sin).zip(y2) {
        *y = Y::from_f32(scale * x2.to_f32().mul_add(*cos, -sign * sin * x1.to_f32()));
    }
}

/// `space` is as long as a row.
#[inline(always)]
fn norm<L: Float>(
    x: &[L],
    dy: Option<&[L]>,
    out: &mut [L],
    angles: Option<[&[f32]; 2]>,
    eps: f32,
    space: &mut [f32],
) {
    let width = x.len() as f32;
    let scale = 1.0 / (dot(x, x) / width + eps).sqrt(); // of the rotated row as well
    let Some(dy) = dy else {
        return rotate(x, out, angles, 1.0, scale);
    };
    rotate(dy, space, angles, -1.0, scale);
    let along = dot(space, x) / width * scale * scale;
    for ((out, g), x) in out.iter_mut().zip(space).zip(x) {
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
fn relu_square<L: Float>(x: &[L], dy: Option<&[L]>, out: &mut [L]) {
    let Some(dy) = dy else {
        for (out, x) in out.iter_mut().zip(x) {
            let x = relu(x.to_f32());
            *out = L::from_f32(x * x);
        }
        return;
    };
    for ((out, x), dy) in out.iter_mut().zip(x).zip(dy) {
        *out = L::from_f32(2.0 * relu(x.to_f32()) * dy.to_f32());
    }
}

/// Of the first `seen` elements. `space` is as long as a row.
#[inline(always)]
fn softmax<L: Float>(x: &[L], dy: Option<&[L]>, out: &mut [L], seen: usize, scale: f32, space: &mut [f32]) {
    let x = &x[..seen];
    let space = &mut space[..seen];
    let (out, future) = out.split_at_mut(seen);
    if let Some(dy) = dy {
        let mean = dot(x, &dy[..seen]);
        for ((out, p), dy) in out.iter_mut().zip(x).zip(dy) {
            *out = L::from_f32(scale * p.to_f32() * (dy.to_f32() - mean));
        }
    } else {
        let largest = largest(x);
        for (g, x) in space.iter_mut().zip(x) {
            *g = exp((scale * (x.to_f32() - largest)).clamp(-80.0, 0.0));
        }
        let share = 1.0 / sum(space);
        for (out, g) in out.iter_mut().zip(space) {
            *out = L::from_f32(*g * share);
        }
    }
    future.fill(L::from_f32(0.0));
}

#[multiversion(targets("x86_64+avx2+fma"))]
fn run_part<L: Float>(op: Op, inputs: Inputs<L>, mut out: RowsMut<L>) {
    let Inputs { x, dy, angles } = inputs;
    let mut space = vec![0f32; x.width];
    for [a, b] in out.tokens() {
        for c in 0..out.grid[2] {
            let place = [a, b, c];
            let x = x.row(place);
            let dy = dy.map(|dy| dy.row(place));
            let angles = angles.map(|[cos, sin]| [cos.row(place), sin.row(place)]);
            let out = out.row_mut(place);
            match op {
                Op::Norm { eps } => norm(x, dy, out, angles, eps, &mut space),
                Op::ReluSquare => relu_square(x, dy, out),
                Op::CausalSoftmax { scale } => softmax(x, dy, out, b + 1, scale, &mut space),
            }
        }
    }
}

/// Writes all rows of `out`.
pub fn run<L: Float>(op: Op, inputs: Inputs<L>, out: RowsMut<L>, num_threads: usize) {
    let num_tokens = WORK_OF_A_PART.div_ceil((out.grid[2] * inputs.x.width).max(1));
    for_each(out.split(num_tokens), num_threads, |out| run_part(op, inputs, out));
}
