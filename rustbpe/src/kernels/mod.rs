//! Operations of a transformer on a CPU that torch does slowly: in many passes over memory, or with kernels made for
//! other shapes. The unsafe code is in `tensor` and `threads`, and where `rowwise` gives each row to one thread.

pub mod adamw;
pub mod attention;
pub mod loss;
pub mod math;
pub mod rowwise;
pub mod tensor;
mod threads;

#[cfg(test)]
mod tests;
