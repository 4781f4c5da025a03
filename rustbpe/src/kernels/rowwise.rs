//! What a layer does to rows between its matmuls: RMSNorm without a weight, after a rotation by rotary positions where
//! they are wanted, ReLU^2, and the softmax of causal attention, each with its gradient. torch takes half a dozen passes
//! over memory for one, and a few microseconds to begin each; here a row is done while it is in the cache.

use super::math::{dot, exp, largest, sum, Float};
use super::tensor::{Rows, RowsMut, Tensor};
use super::threads::for_each;
use multiversion::multiversion;
use std::ops::Range;

const WORK_OF_A_PART: usize = 1 << 15; // elements: small, so that a thread that is held up holds nobody else up

#[derive(Clone, Copy)]
pub enum Op {
    Norm {
        eps: f32,
    },
    ReluSquare,
    /// Of the first b + 1 elements of row (a, b, c) times the scale; the others become 0.
    CausalSoftmax {
        scale: f32,
    },
}

/// out = op(x); or with dy, the gradient of the result, out = the gradient of x. For the gradient of CausalSoftmax, x is
/// its result. With angles, the cosines and sines of (1 or a, b, 1, width / 2), Norm first rotates the pairs
/// (i, i + width / 2) of each row by minus the angle.
pub struct Task {
    pub op: Op,
    pub x: Tensor,
    pub dy: Option<Tensor>,
    pub angles: Option<[Tensor; 2]>,
    pub out: Tensor,
}

/// The rows that are read.
#[derive(Clone, Copy)]
struct Inputs<'a, L> {
    x: Rows<'a, L>,
    dy: Option<Rows<'a, L>>,
    angles: Option<[Rows<'a, f32>; 2]>,
}

impl Task {
    pub fn run<L: Float>(&mut self, num_threads: usize) -> Result<(), String> {
        let op = self.op;
        let shape @ [a, b, c, width] = self.out.shape;
        if matches!(op, Op::CausalSoftmax { .. }) && b > width {
            return Err(format!("{b} queries, but {width} keys"));
        }
        let mut read = vec![&self.x];
        let mut inputs = Inputs { x: self.x.rows::<L>(shape, 3)?, dy: None, angles: None };
        if let Some(dy) = &self.dy {
            read.push(dy);
            inputs.dy = Some(dy.rows(shape, 3)?);
        }
        if let Some([cos, sin]) = &self.angles {
            read.extend([cos, sin]);
            if width % 2 != 0 {
                return Err(format!("rows of {width} elements are no pairs to rotate"));
            }
            let half = [a, b, 1, width / 2];
            inputs.angles = Some([cos.rows(half, 3)?, sin.rows(half, 3)?]);
        }
        let out = self.out.rows_mut::<L>(&read)?;
        if shape.contains(&0) {
            return Ok(());
        }
        let num_tokens = a * b;
        let share = WORK_OF_A_PART.div_ceil(c * width);
        for_each(0..num_tokens.div_ceil(share), num_threads, |part| {
            let tokens = part * share..num_tokens.min((part + 1) * share);
            run_part(op, inputs, &out, shape, tokens)
        });
        Ok(())
    }
}

/// The rows of some tokens, the pairs (a, b) in rows (a, b, c). The caller gives each token to one thread.
#[multiversion(targets("x86_64+avx2+fma"))]
fn run_part<L: Float>(op: Op, inputs: Inputs<L>, out: &RowsMut<L>, shape: [usize; 4], tokens: Range<usize>) {
    let [_, num_b, num_c, width] = shape;
    let mut space = vec![0f32; width];
    for token in tokens {
        let (a, b) = (token / num_b, token % num_b);
        let angles = inputs.angles.map(|[cos, sin]| [cos.row([a, b, 0]), sin.row([a, b, 0])]);
        for c in 0..num_c {
            let place = [a, b, c];
            let x = inputs.x.row(place);
            let dy = inputs.dy.map(|dy| dy.row(place));
            // SAFETY: each token belongs to one part, each part to one thread, which asks for each row once.
            let out = unsafe { out.row_mut(place) };
            match op {
                Op::Norm { eps } => norm(x, dy, out, angles, eps, &mut space),
                Op::ReluSquare => relu_square(x, dy, out),
                Op::CausalSoftmax { scale } => softmax(x, dy, out, b + 1, scale, &mut space),
            }
        }
    }
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
fn norm<L: Float>(x: &[L], dy: Option<&[L]>, out: &mut [L], angles: Option<[&[f32]; 2]>, eps: f32, space: &mut [f32]) {
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
fn relu_square<L: Float>(x: &[L], dy: Option<&[L]>, out: &mut [L]) {
    if let Some(dy) = dy {
        for ((out, x), dy) in out.iter_mut().zip(x).zip(dy) {
            let x = x.to_f32();
            let x = if x < 0.0 { 0.0 } else { x };
            *out = L::from_f32(2.0 * x * dy.to_f32());
        }
    } else {
        for (out, x) in out.iter_mut().zip(x) {
            let x = x.to_f32();
            let x = if x < 0.0 { 0.0 } else { x }; // a NaN stays, which f32::max would hide
            *out = L::from_f32(x * x);
        }
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
