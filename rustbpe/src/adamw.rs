//! The update of AdamW on a CPU, in one pass over four tensors where torch takes eight.

use crate::threads::for_each;

const PART: usize = 1 << 15; // numbers

/// What is less than this becomes 0. While a token does not occur, the means of its rows in a table fade step by step,
/// and numbers below 2^-126 take a processor 40 times as long. At this size they move no parameter any more.
const NOTHING: f32 = 1e-30;

#[inline(always)]
fn fade(number: f32) -> f32 {
    if number.abs() < NOTHING {
        0.0
    } else {
        number
    }
}

#[derive(Clone, Copy)]
pub struct Rates {
    pub lr: f32,    // over the bias correction of exp_avg
    pub decay: f32, // what a parameter is multiplied with
    pub beta1: f32,
    pub beta2: f32,
    pub correction2: f32, // of exp_avg_sq
    pub eps: f32,
}

/// The tensors, or a part of each: the parameters, their gradient, and its running means, plain and squared.
pub struct State<'a> {
    pub param: &'a mut [f32],
    pub grad: &'a [f32],
    pub exp_avg: &'a mut [f32],
    pub exp_avg_sq: &'a mut [f32],
}

#[inline(always)]
fn update_generic(state: State, rates: Rates) {
    let Rates { lr, decay, beta1, beta2, correction2, eps } = rates;
    let numbers = state.param.iter_mut().zip(state.grad).zip(state.exp_avg).zip(state.exp_avg_sq);
    for (((param, grad), mean), square) in numbers {
        *mean = fade(*mean + (1.0 - beta1) * (grad - *mean));
        *square = fade(beta2 * *square + (1.0 - beta2) * grad * grad);
        *param = decay * *param - lr * *mean / ((*square / correction2).sqrt() + eps);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn update_avx2(state: State, rates: Rates) {
    update_generic(state, rates)
}

pub fn update(state: State, rates: Rates, num_threads: usize) {
    let parts = state.param.chunks_mut(PART).zip(state.grad.chunks(PART));
    let parts = parts.zip(state.exp_avg.chunks_mut(PART)).zip(state.exp_avg_sq.chunks_mut(PART));
    for_each(parts, num_threads, |(((param, grad), exp_avg), exp_avg_sq)| {
        let state = State { param, grad, exp_avg, exp_avg_sq };
        #[cfg(target_arch = "x86_64")]
        if crate::loss::has_avx2() {
            return unsafe { update_avx2(state, rates) }; // safe: the processor has both
        }
        update_generic(state, rates)
    });
}
