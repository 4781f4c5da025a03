//! nanochat's native extension: two Python modules in one library.
//!
//! `rustbpe`, in `bpe`, trains a byte-level BPE tokenizer and applies it. `rustbpe.kernels`, in `kernels`, has
//! operations of a transformer on a CPU. Neither knows Python: `py_bpe` and `py_kernels` are the bindings.

mod bpe;
mod kernels;
mod py_bpe;
mod py_kernels;

#[pyo3::pymodule]
mod rustbpe {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::py_bpe::Tokenizer;
    #[pymodule_export]
    use crate::py_kernels::kernels;

    /// Python finds `import rustbpe.kernels` among the modules that are loaded, as there is no file of this name.
    #[pymodule_init]
    fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let kernels = module.getattr("kernels")?;
        kernels.setattr("__name__", "rustbpe.kernels")?;
        module.py().import("sys")?.getattr("modules")?.set_item("rustbpe.kernels", kernels)
    }
}
