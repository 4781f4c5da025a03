//! torch's tensors as slices and rows: the one place where an address becomes memory that Rust reads and writes.

use super::math::Bf16;
use std::slice::{from_raw_parts, from_raw_parts_mut};

/// A dtype, with the bytes of an element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Dtype {
    Bfloat16 = 2,
    Float32 = 4,
    Int64 = 8,
}

/// The Rust type of a tensor's elements: as large as its dtype, and any bits are a value of it.
pub trait Element: Copy + Send + Sync {
    const DTYPE: Dtype;
}

impl Element for Bf16 {
    const DTYPE: Dtype = Dtype::Bfloat16;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::Float32;
}

impl Element for i64 {
    const DTYPE: Dtype = Dtype::Int64;
}

/// Where the elements of a tensor lie. Fewer than four dimensions are preceded by dimensions of size 1.
pub struct Tensor {
    address: usize,
    len: usize, // elements from the first to the last, with those between them that are not the tensor's
    pub dtype: Dtype,
    pub shape: [usize; 4],
    strides: [usize; 4], // in elements
}

impl Tensor {
    /// An error for what cannot be a tensor: a null or misaligned address, more elements than memory has.
    ///
    /// # Safety
    /// A tensor of this description exists. Until the last use of this value and its slices, its memory stays where it
    /// is, and no other thread writes to it.
    pub unsafe fn new(address: usize, dtype: Dtype, shape: [usize; 4], strides: [usize; 4]) -> Result<Self, String> {
        let mut len = Some(1usize);
        for (size, stride) in shape.iter().zip(strides) {
            let extent = size.saturating_sub(1).checked_mul(stride);
            len = len.and_then(|len| len.checked_add(extent?));
        }
        if shape.contains(&0) {
            len = Some(0);
        }
        let bytes = len.and_then(|len| len.checked_mul(dtype as usize));
        let end = bytes.and_then(|bytes| address.checked_add(bytes));
        let fits = bytes.is_some_and(|bytes| bytes <= isize::MAX as usize) && end.is_some();
        let Some(len) = len.filter(|_| fits) else {
            return Err(format!("shape {shape:?} with strides {strides:?} is larger than memory"));
        };
        if len > 0 && (address == 0 || address % dtype as usize != 0) {
            return Err(format!("{address:#x} is not the address of a {dtype:?}"));
        }
        Ok(Tensor { address, len, dtype, shape, strides })
    }

    /// Checks that the elements are `T`, lie side by side in each block of the dimensions from `first` on, and share
    /// no memory with `others`.
    fn check<T: Element>(&self, first: usize, others: &[&Tensor]) -> Result<(), String> {
        let Tensor { dtype, shape, strides, .. } = self;
        if *dtype != T::DTYPE {
            return Err(format!("a tensor is {dtype:?}, but {:?} is needed", T::DTYPE));
        }
        let mut expected = 1usize;
        for i in (first..4).rev() {
            if self.len > 0 && shape[i] > 1 && strides[i] != expected {
                return Err(format!("a tensor of shape {shape:?} with strides {strides:?} is not contiguous"));
            }
            expected = expected.saturating_mul(shape[i]);
        }
        let end = |tensor: &Tensor| tensor.address + tensor.len * tensor.dtype as usize;
        if others.iter().any(|other| self.address < end(other) && other.address < end(self)) {
            return Err("a tensor that is written shares memory with another tensor of the call".to_string());
        }
        Ok(())
    }

    /// The elements of a contiguous tensor.
    pub fn slice<T: Element>(&self) -> Result<&[T], String> {
        Ok(self.rows(self.shape, 0)?.elements)
    }

    /// The elements of a contiguous tensor, to be written to. `others`: all other tensors of the call.
    pub fn slice_mut<T: Element>(&mut self, others: &[&Tensor]) -> Result<&mut [T], String> {
        self.check::<T>(0, others)?;
        if self.len == 0 {
            return Ok(&mut []);
        }
        // SAFETY: `new` checked address and size, `check` the type and that no other tensor of the call has this
        // memory; no other slice of this one is alive, as it is borrowed; the rest is the promise of `new`'s caller.
        Ok(unsafe { from_raw_parts_mut(self.address as *mut T, self.len) })
    }

    /// The rows of a tensor of a shape. A row has all of the dimensions from `first` on. Where an earlier dimension has
    /// size 1 instead, the same rows stand for all of its indices.
    pub fn rows<T: Element>(&self, shape: [usize; 4], first: usize) -> Result<Rows<'_, T>, String> {
        self.check::<T>(first, &[])?;
        let mut strides = [0; 3];
        for i in 0..4 {
            let is_repeated = i < first && self.shape[i] == 1;
            if self.shape[i] != shape[i] && !is_repeated {
                return Err(format!("a tensor has shape {:?}, but {shape:?} is needed", self.shape));
            }
            if i < first && !is_repeated {
                strides[i] = self.strides[i];
            }
        }
        let elements = match self.len {
            0 => &[],
            // SAFETY: as in `slice_mut`; what the call writes to lies elsewhere, as its `check` makes sure.
            len => unsafe { from_raw_parts(self.address as *const T, len) },
        };
        Ok(Rows { elements, strides, width: shape[first..].iter().product() })
    }

    /// The rows of the last dimension, to be written to, as for `slice_mut`.
    pub fn rows_mut<T: Element>(&mut self, others: &[&Tensor]) -> Result<RowsMut<'_, T>, String> {
        self.check::<T>(3, others)?;
        let mut dimensions = [0, 1, 2].map(|i| (self.strides[i], self.shape[i]));
        dimensions.sort();
        let mut end = self.shape[3]; // of the elements that the dimensions so far reach
        for (stride, size) in dimensions {
            if self.len > 0 && size > 1 {
                if stride < end {
                    return Err("the rows of a tensor that is written overlap".to_string());
                }
                end += stride * (size - 1);
            }
        }
        Ok(RowsMut { start: self.address as *mut T, tensor: self })
    }
}

/// The rows of a tensor that is read, by their indices in the first three dimensions.
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    elements: &'a [T],
    strides: [usize; 3],
    width: usize,
}

impl<'a, T> Rows<'a, T> {
    #[inline(always)]
    pub fn row(&self, [a, b, c]: [usize; 3]) -> &'a [T] {
        let start = a * self.strides[0] + b * self.strides[1] + c * self.strides[2];
        &self.elements[start..start + self.width]
    }
}

/// The rows of a tensor that several threads write to.
pub struct RowsMut<'a, T> {
    start: *mut T,
    tensor: &'a mut Tensor,
}

// SAFETY: `row_mut`, which is unsafe, is all that threads can do with it at the same time.
unsafe impl<T: Element> Sync for RowsMut<'_, T> {}

impl<T: Element> RowsMut<'_, T> {
    /// # Safety
    /// While the row is in use it is not asked for again.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row_mut(&self, [a, b, c]: [usize; 3]) -> &mut [T] {
        let Tensor { len, shape, strides, .. } = &*self.tensor;
        assert!(*len > 0 && a < shape[0] && b < shape[1] && c < shape[2]);
        let offset = a * strides[0] + b * strides[1] + c * strides[2];
        // SAFETY: the row is in the tensor, whose memory and type `rows_mut` checked as `slice_mut` does; no two rows
        // overlap, and the caller uses this one once.
        unsafe { from_raw_parts_mut(self.start.add(offset), shape[3]) }
    }
}
