//! The update of AdamW, in one pass over four tensors where torch takes eight.

use super::threads::for_each;
use multiversion::multiversion;

const PART: usize = 1 << 15; // elements

/// Means below this become 0. While a token does not occur, the means of its rows in a table fade step by step, and
/// numbers below 2^-126 take a processor 40 times as long. At this size they move no parameter any more.
const NEGLIGIBLE: f32 = 1e-30;

#[inline(always)]
fn fade(mean: f32) -> f32 {
    if mean.abs() < NEGLIGIBLE {
        0.0
    } else {
        mean
    }
}

#[derive(Clone, Copy)]
pub struct Rates {
    pub lr: f32,    // divided by the bias correction of exp_avg
    pub decay: f32, // factor of the parameters
    pub beta1: f32,
    pub beta2: f32,
    pub correction2: f32, // bias correction of exp_avg_sq
    pub eps: f32,
}

/// The tensors, or a part of each: the parameters, their gradient, and its running means, plain and squared.
pub struct State<'a> {
    pub param: &'a mut [f32],
    pub grad: &'a [f32],
    pub exp_avg: &'a mut [f32],
    pub exp_avg_sq: &'a mut [f32],
}

#[multiversion(targets("x86_64+avx2+fma"))]
fn update_part(state: State, rates: Rates) {
    let Rates { lr, decay, beta1, beta2, correction2, eps } = rates;
    let elements = state.param.iter_mut().zip(state.grad).zip(state.exp_avg).zip(state.exp_avg_sq);
    for (((param, grad), mean), square) in elements {
        *mean = fade(*mean + (1.0 - beta1) * (grad - *mean));
        *square = fade(beta2 * *square + (1.0 - beta2) * grad * grad);
        *param = decay * *param - lr * *mean / ((*square / correction2).sqrt() + eps);
    }
}

pub fn update(state: State, rates: Rates, num_threads: usize) {
    let parts = state.param.chunks_mut(PART).zip(state.grad.chunks(PART));
    let parts = parts.zip(state.exp_avg.chunks_mut(PART)).zip(state.exp_avg_sq.chunks_mut(PART));
    for_each(parts, num_threads, |(((param, grad), exp_avg), exp_avg_sq)| {
        update_part(State { param, grad, exp_avg, exp_avg_sq }, rates)
    });
}
