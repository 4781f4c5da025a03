//! The update of AdamW, in one pass over four tensors where torch takes eight.

use super::tensor::Tensor;
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

/// (step, counted from 1; lr; betas; eps; weight decay)
pub type Settings = (i32, f64, (f64, f64), f64, f64);

#[derive(Clone, Copy)]
struct Rates {
    lr: f32,    // divided by the bias correction of exp_avg
    decay: f32, // factor of the parameters
    beta1: f32,
    beta2: f32,
    correction2: f32, // bias correction of exp_avg_sq
    eps: f32,
}

/// One step for parameters, their gradient, and its running means, plain and squared; all but the gradient change.
pub fn update(tensors: [Tensor; 4], settings: Settings, num_threads: usize) -> Result<(), String> {
    let (step, lr, (beta1, beta2), eps, weight_decay) = settings;
    let rates = Rates {
        lr: (lr / (1.0 - beta1.powi(step))) as f32,
        decay: (1.0 - lr * weight_decay) as f32,
        beta1: beta1 as f32,
        beta2: beta2 as f32,
        correction2: (1.0 - beta2.powi(step)) as f32,
        eps: eps as f32,
    };
    let [mut param, grad, mut exp_avg, mut exp_avg_sq] = tensors;
    if [grad.shape, exp_avg.shape, exp_avg_sq.shape] != [param.shape; 3] {
        return Err("the parameters, their gradient and its means differ in shape".to_string());
    }
    let parts = param.slice_mut(&[&grad, &exp_avg, &exp_avg_sq])?.chunks_mut(PART);
    let parts = parts.zip(exp_avg.slice_mut(&[&grad, &exp_avg_sq])?.chunks_mut(PART));
    let parts = parts.zip(exp_avg_sq.slice_mut(&[&grad])?.chunks_mut(PART));
    let parts = parts.zip(grad.slice()?.chunks(PART));
    for_each(parts, num_threads, |(((param, exp_avg), exp_avg_sq), grad)| {
        update_part(param, grad, exp_avg, exp_avg_sq, rates)
    });
    Ok(())
}

#[multiversion(targets("x86_64+avx2+fma"))]
fn update_part(param: &mut [f32], grad: &[f32], exp_avg: &mut [f32], exp_avg_sq: &mut [f32], rates: Rates) {
    let Rates { lr, decay, beta1, beta2, correction2, eps } = rates;
    let elements = param.iter_mut().zip(grad).zip(exp_avg).zip(exp_avg_sq);
    for (((param, grad), mean), square) in elements {
        *mean = fade(*mean + (1.0 - beta1) * (grad - *mean));
        *square = fade(beta2 * *square + (1.0 - beta2) * grad * grad);
        *param = decay * *param - lr * *mean / ((*square / correction2).sqrt() + eps);
    }
}
