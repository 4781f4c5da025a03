//! The Python module `rustbpe.kernels`. A tensor is (address, dtype, shape, strides), as nanochat/cpu_kernels.py
//! describes it; what does not fit is a ValueError. The GIL is released around all real work.

use crate::kernels::adamw::{self, Settings};
use crate::kernels::math::Bf16;
use crate::kernels::rowwise::{Op, Task};
use crate::kernels::tensor::{Dtype, Tensor};
use crate::kernels::{attention, loss};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

impl<'py> FromPyObject<'_, 'py> for Tensor {
    type Error = PyErr;

    fn extract(description: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let description = description.cast::<PyTuple>()?;
        let address = description.get_borrowed_item(0)?.extract()?;
        let dtype = match description.get_borrowed_item(1)?.extract()? {
            "bfloat16" => Dtype::Bfloat16,
            "float32" => Dtype::Float32,
            "int64" => Dtype::Int64,
            name => return Err(PyValueError::new_err(format!("no kernel takes {name}"))),
        };
        let shape = four(description.get_borrowed_item(2)?, 1)?;
        let strides = four(description.get_borrowed_item(3)?, 0)?;
        // SAFETY: cpu_kernels.py describes a tensor that it holds until the call returns; nanochat gives the tensors
        // of a call to no other thread meanwhile.
        let tensor = unsafe { Tensor::new(address, dtype, shape, strides) };
        tensor.map_err(PyValueError::new_err)
    }
}

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

/// Extracted from a tuple faster than an array
type Four = (Tensor, Tensor, Tensor, Tensor);

fn release_gil(py: Python<'_>, work: impl FnOnce() -> Result<(), String> + Send) -> PyResult<()> {
    py.detach(work).map_err(PyValueError::new_err)
}

/// out = op(x), row by row; see `Task`. op: 'norm' (value: eps), 'relu_square', or 'causal_softmax' (value: scale).
#[pyfunction]
#[pyo3(signature = (op, x, out, num_threads, value=0.0, dy=None, angles=None))]
#[allow(clippy::too_many_arguments)]
fn row_op(
    py: Python<'_>, op: &str, x: Tensor, out: Tensor, num_threads: usize, value: f32, dy: Option<Tensor>,
    angles: Option<(Tensor, Tensor)>,
) -> PyResult<()> {
    let op = match op {
        "norm" => Op::Norm { eps: value },
        "relu_square" => Op::ReluSquare,
        "causal_softmax" => Op::CausalSoftmax { scale: value },
        _ => return Err(PyValueError::new_err(format!("there is no operation {op}"))),
    };
    let mut task = Task { op, x, dy, angles: angles.map(Into::into), out };
    let run = if task.x.dtype == Dtype::Bfloat16 { Task::run::<Bf16> } else { Task::run::<f32> };
    release_gil(py, move || run(&mut task, num_threads))
}

/// See `attention::attend`.
#[pyfunction]
fn one_token_attention(
    py: Python<'_>, q: Tensor, k: Tensor, v: Tensor, mut out: Tensor, last: Option<Tensor>, num_threads: usize,
) -> PyResult<()> {
    let attend = if q.dtype == Dtype::Bfloat16 { attention::attend::<Bf16> } else { attention::attend::<f32> };
    release_gil(py, || attend(&q, &k, &v, last.as_ref(), &mut out, num_threads))
}

/// tensors: logits, targets, weights, losses; see `loss::capped_cross_entropy`.
#[pyfunction]
fn capped_cross_entropy(py: Python<'_>, tensors: Four, cap: f32, num_threads: usize) -> PyResult<()> {
    let is_bfloat16 = tensors.0.dtype == Dtype::Bfloat16;
    let run = if is_bfloat16 { loss::capped_cross_entropy::<Bf16> } else { loss::capped_cross_entropy::<f32> };
    release_gil(py, || run(tensors.into(), cap, num_threads))
}

/// tensors: the parameters, their gradient, exp_avg, exp_avg_sq; see `adamw::update`.
#[pyfunction]
fn adamw_update(py: Python<'_>, tensors: Four, settings: Settings, num_threads: usize) -> PyResult<()> {
    release_gil(py, || adamw::update(tensors.into(), settings, num_threads))
}

#[pymodule]
pub mod kernels {
    #[pymodule_export]
    use super::{adamw_update, capped_cross_entropy, one_token_attention, row_op};
}
