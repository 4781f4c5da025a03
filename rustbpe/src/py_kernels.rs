//! The Python module `rustbpe.kernels`. A tensor is (address, dtype, shape, strides), as nanochat/cpu_kernels.py
//! describes it; what does not fit is a ValueError. The GIL is released around all real work.

use crate::kernels::adamw::{self, Rates, State};
use crate::kernels::attention;
use crate::kernels::loss::{loss_of_bf16, loss_of_f32, Rows};
use crate::kernels::math::{Bf16, Float};
use crate::kernels::rowwise::{self, Op};
use crate::kernels::tensor::{Dtype, Tensor};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// Four sizes or strides, those of fewer dimensions preceded by `fill`.
fn four(values: Borrowed<'_, '_, PyAny>, fill: usize) -> PyResult<[usize; 4]> {
    let values = values.cast::<PyTuple>()?;
    let Some(missing) = 4usize.checked_sub(values.len()) else {
        return Err(PyValueError::new_err(format!("{} dimensions: a kernel takes up to four", values.len())));
    };
    let mut four = [fill; 4];
    for (i, place) in four[missing..].iter_mut().enumerate() {
        *place = values.get_borrowed_item(i)?.extract()?;
    }
    Ok(four)
}

impl<'py> FromPyObject<'_, 'py> for Tensor {
    type Error = PyErr;

    fn extract(description: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let description = description.cast::<PyTuple>()?;
        let address = description.get_borrowed_item(0)?.extract()?;
        let dtype = Dtype::parse(description.get_borrowed_item(1)?.extract()?).map_err(PyValueError::new_err)?;
        let shape = four(description.get_borrowed_item(2)?, 1)?;
        let strides = four(description.get_borrowed_item(3)?, 0)?;
        // SAFETY: cpu_kernels.py makes the description from a tensor that it holds until the call returns, and no
        // other thread is given the tensors of a call meanwhile.
        let tensor = unsafe { Tensor::new(address, dtype, shape, strides) };
        tensor.map_err(PyValueError::new_err)
    }
}

/// out = op(x), row by row. op: 'norm' (value: eps), after a rotation where there are angles (cosines, sines);
/// 'relu_square'; or 'causal_softmax' (value: scale). With dy, the gradient of the result, out = the gradient of x; x of
/// 'causal_softmax' is then the result.
#[pyfunction]
#[pyo3(signature = (op, x, out, num_threads, value=0.0, dy=None, angles=None))]
#[allow(clippy::too_many_arguments)]
fn row_op(
    py: Python<'_>,
    op: &str,
    x: Tensor,
    mut out: Tensor,
    num_threads: usize,
    value: f32,
    dy: Option<Tensor>,
    angles: Option<[Tensor; 2]>,
) -> PyResult<()> {
    let [a, b, c, width] = out.shape;
    let op = match op {
        "norm" => Op::Norm { eps: value },
        "relu_square" => Op::ReluSquare,
        "causal_softmax" if b <= width => Op::CausalSoftmax { scale: value },
        _ => return Err(PyValueError::new_err(format!("there is no {op} of this kind"))),
    };
    let run = if x.dtype == Dtype::Bfloat16 { run_rows::<Bf16> } else { run_rows::<f32> };
    py.detach(|| run(op, [a, b, c], &x, dy.as_ref(), angles.as_ref(), &mut out, num_threads))
        .map_err(PyValueError::new_err)
}

fn run_rows<L: Float>(
    op: Op,
    grid: [usize; 3],
    x: &Tensor,
    dy: Option<&Tensor>,
    angles: Option<&[Tensor; 2]>,
    out: &mut Tensor,
    num_threads: usize,
) -> Result<(), String> {
    let width = out.shape[3];
    let mut others = vec![x];
    others.extend(dy);
    others.extend(angles.into_iter().flatten());
    let dy = dy.map(|dy| dy.rows::<L>(grid)).transpose()?;
    let angles = match angles {
        Some([cos, sin]) => Some([cos.rows::<f32>(grid)?, sin.rows::<f32>(grid)?]),
        None => None,
    };
    let x = x.rows::<L>(grid)?;
    let inputs = rowwise::Inputs { x, dy, angles };
    let is_wide = |width: usize| x.width == width && dy.is_none_or(|dy| dy.width == width);
    if !is_wide(width) || angles.is_some_and(|[cos, sin]| cos.width * 2 != width || sin.width * 2 != width) {
        return Err("rows differ in width".to_string());
    }
    rowwise::run(op, inputs, out.rows_mut::<L>(&others)?, num_threads);
    Ok(())
}

/// out = attention of one token a row: q and out (B, H, 1, D), k and v (B, H_kv, S, D), up to position
/// last (B, 1).
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn one_token_attention(
    py: Python<'_>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mut out: Tensor,
    last: Option<Tensor>,
    num_threads: usize,
) -> PyResult<()> {
    let run = if q.dtype == Dtype::Bfloat16 { run_attention::<Bf16> } else { run_attention::<f32> };
    py.detach(|| run(&q, &k, &v, &mut out, last.as_ref(), num_threads)).map_err(PyValueError::new_err)
}

fn run_attention<L: Float>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    out: &mut Tensor,
    last: Option<&Tensor>,
    num_threads: usize,
) -> Result<(), String> {
    let [rows, heads, _, dim] = q.shape;
    let [_, kv_heads, positions, _] = k.shape;
    let is_right = out.shape == q.shape && q.shape[2] == 1 && k.shape == v.shape ;
    if !is_right || k.shape[0] != rows || k.shape[3] != dim || kv_heads == 0 || heads % kv_heads != 0 {
        return Err(format!("q {:?} does not fit k {:?} and v {:?}", q.shape, k.shape, v.shape));
    }
    let lengths = match last {
        Some(last) => last.slice::<i64>()?.iter().map(|&last| last as usize + 1).collect(),
        None => vec![positions; rows],
    };
    if lengths.len() != rows || lengths.iter().any(|&length| length == 0 || length > positions) {
        return Err(format!("lengths must be from 1 to {positions}, but are {lengths:?}"));
    }
    let inputs = attention::Inputs {
        q: q.slice::<L>()?,
        k: k.blocks::<L>(2, [rows, kv_heads, 1])?,
        v: v.blocks::<L>(2, [rows, kv_heads, 1])?,
        lengths: &lengths,
        heads,
        kv_heads,
        dim,
    };
    attention::attend(inputs, out.slice_mut::<L>(&[q, k, v])?, num_threads);
    Ok(())
}

/// The losses (n,) of raw logits (n, V), capped by cap * tanh(x / cap), times weights (n,), for targets (n,). The
/// gradient takes the place of the logits.
#[pyfunction]
fn capped_cross_entropy(
    py: Python<'_>,
    mut logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    mut losses: Tensor,
    cap: f32,
    num_threads: usize,
) -> PyResult<()> {
    let run = || -> Result<(), String> {
        let [_, _, rows, width] = logits.shape;
        let targets_slice = targets.slice::<i64>()?;
        let weights_slice = weights.slice::<f32>()?;
        let is_bfloat16 = logits.dtype == Dtype::Bfloat16;
        if targets_slice.iter().any(|&target| target as usize >= width) {
            return Err(format!("a target is outside the vocabulary of {width} tokens"));
        }
        let losses_slice = losses.slice_mut::<f32>(&[&logits, &targets, &weights])?;
        if [targets_slice.len(), weights_slice.len(), losses_slice.len()] != [rows; 3] {
            return Err(format!("targets, weights and losses must each have {rows} elements, one a row of logits"));
        }
        if is_bfloat16 {
            let logits = logits.slice_mut::<Bf16>(&[&targets, &weights])?;
            loss_of_bf16(Rows { logits, targets: targets_slice, weights: weights_slice, losses: losses_slice }, cap, num_threads);
        } else {
            let logits = logits.slice_mut::<f32>(&[&targets, &weights])?;
            loss_of_f32(Rows { logits, targets: targets_slice, weights: weights_slice, losses: losses_slice }, cap, num_threads);
        }
        Ok(())
    };
    py.detach(run).map_err(PyValueError::new_err)
}

/// One step of AdamW on float32 tensors of one size; all but the gradient change. `step` counts from 1.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn adamw_update(
    py: Python<'_>,
    mut param: Tensor,
    grad: Tensor,
    mut exp_avg: Tensor,
    mut exp_avg_sq: Tensor,
    step: i32,
    lr: f64,
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
    num_threads: usize,
) -> PyResult<()> {
    let (beta1, beta2) = betas;
    let rates = Rates {
        lr: (lr / (1.0 - beta1.powi(step))) as f32,
        decay: (1.0 - lr * weight_decay) as f32,
        beta1: beta1 as f32,
        beta2: beta2 as f32,
        correction2: (1.0 - beta2.powi(step)) as f32,
        eps: eps as f32,
    };
    let run = || -> Result<(), String> {
        let size = param.shape;
        if grad.shape != size || exp_avg.shape != size || exp_avg_sq.shape != size {
            return Err("shape".into());
        }
        let state = State {
            param: param.slice_mut(&[&grad, &exp_avg, &exp_avg_sq])?,
            exp_avg: exp_avg.slice_mut(&[&grad, &exp_avg_sq])?,
            exp_avg_sq: exp_avg_sq.slice_mut(&[&grad])?,
            grad: grad.slice()?,
        };
        adamw::update(state, rates, num_threads);
        Ok(())
    };
    py.detach(run).map_err(PyValueError::new_err)
}

#[pymodule]
pub mod kernels {
    #[pymodule_export]
    use super::{adamw_update, capped_cross_entropy, one_token_attention, row_op};
}
