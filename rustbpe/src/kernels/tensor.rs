//! torch's tensors as slices: the one place where an address becomes memory that Rust reads and writes.

use super::math::Bf16;
use std::marker::PhantomData;
use std::ops::Range;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Dtype {
    Float32,
    Bfloat16,
    Int64,
}

impl Dtype {
    pub fn parse(name: &str) -> Result<Self, String> {
        match name {
            "float32" => Ok(Dtype::Float32),
            "bfloat16" => Ok(Dtype::Bfloat16),
            "int64" => Ok(Dtype::Int64),
            _ => Err(format!("no kernel takes {name}: they take float32, bfloat16 and int64")),
        }
    }

    /// Bytes of an element, which are also its alignment.
    fn size(self) -> usize {
        match self {
            Dtype::Float32 => 4,
            Dtype::Bfloat16 => 2,
            Dtype::Int64 => 8,
        }
    }
}

/// The Rust type of a tensor's elements: of the size of its DTYPE, and any bits are a value of it.
pub trait Element: Copy + Send + Sync {
    const DTYPE: Dtype;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::Float32;
}

impl Element for Bf16 {
    const DTYPE: Dtype = Dtype::Bfloat16;
}

impl Element for i64 {
    const DTYPE: Dtype = Dtype::Int64;
}

/// Where the elements of a tensor lie. Fewer than four dimensions are preceded by dimensions of size 1.
pub struct Tensor {
    address: usize,
    len: usize, // elements from the first to the last, with those that lie between and are not of this tensor
    pub dtype: Dtype,
    pub shape: [usize; 4],
    strides: [usize; 4], // in elements
}

impl Tensor {
    /// An error for what can be no tensor: no address, an odd one, a size beyond the address space.
    ///
    /// # Safety
    /// A tensor of this description exists; until the last use of this value and of its slices its memory stays where
    /// it is, and no other thread writes to it.
    pub unsafe fn new(
        address: usize,
        dtype: Dtype,
        shape: [usize; 4],
        strides: [usize; 4],
    ) -> Result<Self, String> {
        let mut last = Some(0usize); // index of the last element
        for (size, stride) in shape.iter().zip(strides) {
            let steps = size.saturating_sub(1);
            last = last.and_then(|last| last.checked_add(steps.checked_mul(stride)?));
        }
        let len = if shape.contains(&0) { Some(0) } else { last.and_then(|last| last.checked_add(1)) };
        let bytes = len.and_then(|len| len.checked_mul(dtype.size())).filter(|&bytes| bytes <= isize::MAX as usize);
        let end = bytes.and_then(|bytes| address.checked_add(bytes));
        let (Some(len), Some(_)) = (len, end) else {
            return Err(format!("shape {shape:?} with strides {strides:?} is larger than memory"));
        };
        if len > 0 && (address == 0 || address % dtype.size() != 0) {
            return Err(format!("{address:#x} is not the address of a {dtype:?}"));
        }
        Ok(Tensor { address, len, dtype, shape, strides })
    }

    fn check<T: Element>(&self, is_contiguous: bool) -> Result<(), String> {
        if self.dtype != T::DTYPE {
            return Err(format!("a tensor is {:?}, but {:?} is needed", self.dtype, T::DTYPE));
        }
        if !is_contiguous {
            let Tensor { shape, strides, .. } = self;
            return Err(format!("shape {shape:?} with strides {strides:?} is not contiguous"));
        }
        Ok(())
    }

    /// Whether the elements of each block of the last dimensions, from `first` on, lie side by side.
    fn is_contiguous_from(&self, first: usize) -> bool {
        let mut expected = 1usize;
        for (&size, &stride) in self.shape.iter().zip(&self.strides).skip(first).rev() {
            if size > 1 && stride != expected {
                return false;
            }
            expected = expected.saturating_mul(size);
        }
        true
    }

    /// The elements from the first to the last.
    fn span<T: Element>(&self) -> Result<&[T], String> {
        self.check::<T>(true)?;
        if self.len == 0 {
            return Ok(&[]);
        }
        // SAFETY: `new` checked that the address is neither null nor misaligned and that the size does not overflow,
        // `check` the type. The caller of `new` promised that the memory stays and that no other thread writes to it,
        // and `slice_mut` checks that this call does not.
        Ok(unsafe { std::slice::from_raw_parts(self.address as *const T, self.len) })
    }

    /// The elements of a contiguous tensor.
    pub fn slice<T: Element>(&self) -> Result<&[T], String> {
        self.check::<T>(self.is_contiguous_from(0) || self.len == 0)?;
        self.span()
    }

    /// The same, to be written to. `others` are the other tensors of the call, which must lie elsewhere.
    pub fn slice_mut<T: Element>(&mut self, others: &[&Tensor]) -> Result<&mut [T], String> {
        self.check::<T>(self.is_contiguous_from(0) || self.len == 0)?;
        self.check_apart(others)?;
        if self.len == 0 {
            return Ok(&mut []);
        }
        // SAFETY: as in `span`; and no other slice of this call holds any of the elements, as was just checked, nor
        // does another slice of this tensor, which is borrowed mutably.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.address as *mut T, self.len) })
    }

    /// Its rows, to be written to. `others` as for `slice_mut`.
    pub fn rows_mut<T: Element>(&mut self, others: &[&Tensor]) -> Result<RowsMut<'_, T>, String> {
        self.check::<T>(self.is_contiguous_from(3) || self.len == 0)?;
        self.check_apart(others)?;
        let [a, b, c, width] = self.shape;
        let strides = [self.strides[0], self.strides[1], self.strides[2]];
        let mut dimensions = [(strides[0], a), (strides[1], b), (strides[2], c)];
        dimensions.sort();
        let mut extent = width; // of what the dimensions so far hold
        for (stride, size) in dimensions {
            if size > 1 && stride < extent {
                return Err("the rows of a tensor that is written overlap".to_string());
            }
            extent = extent.saturating_add(stride.saturating_mul(size.saturating_sub(1)));
        }
        let num_tokens = if self.len == 0 { 0 } else { a * b };
        Ok(RowsMut {
            start: self.address as *mut T,
            strides,
            grid: [a, b, c],
            width,
            range: 0..num_tokens,
            lifetime: PhantomData,
        })
    }

    fn check_apart(&self, others: &[&Tensor]) -> Result<(), String> {
        if others.iter().any(|other| self.overlaps(other)) {
            return Err("a tensor that is written shares memory with another tensor of the call".to_string());
        }
        Ok(())
    }

    fn overlaps(&self, other: &Tensor) -> bool {
        let end = self.address + self.len * self.dtype.size();
        let other_end = other.address + other.len * other.dtype.size();
        self.len > 0 && other.len > 0 && self.address < other_end && other.address < end
    }

    /// A row of contiguous elements for each place of a grid. A dimension of size 1 is the same all along the grid.
    pub fn rows<T: Element>(&self, grid: [usize; 3]) -> Result<Rows<'_, T>, String> {
        self.blocks(3, grid)
    }

    /// Blocks of the last dimensions, from `first` on, for each place of a grid.
    pub fn blocks<T: Element>(&self, first: usize, grid: [usize; 3]) -> Result<Rows<'_, T>, String> {
        self.check::<T>(self.is_contiguous_from(first) || self.len == 0)?;
        let mut strides = [0; 3];
        for dimension in 0..first {
            let size = self.shape[dimension];
            if size != 1 {
                strides[dimension] = self.strides[dimension];
            }
            if size != 1 && size != grid[dimension] {
                return Err(format!("shape {:?} does not fit rows of {grid:?}", self.shape));
            }
        }
        let width = self.shape[first..].iter().product();
        Ok(Rows { elements: self.span()?, strides, width })
    }
}

/// The rows of a tensor.
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    elements: &'a [T],
    strides: [usize; 3],
    pub width: usize,
}

impl<'a, T> Rows<'a, T> {
    #[inline(always)]
    pub fn row(&self, place: [usize; 3]) -> &'a [T] {
        let [a, b, c] = place;
        let start = a * self.strides[0] + b * self.strides[1] + c * self.strides[2];
        &self.elements[start..start + self.width]
    }
}

/// The rows of a tensor that is written, or those of a range of its tokens, the pairs (a, b) in places (a, b, c).
pub struct RowsMut<'a, T> {
    start: *mut T,
    strides: [usize; 3],
    pub grid: [usize; 3],
    width: usize,
    range: Range<usize>,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it is the only way to its elements, as a `&mut [T]` would be: `split` gives each range to one value.
unsafe impl<T: Element> Send for RowsMut<'_, T> {}

impl<'a, T: Element> RowsMut<'a, T> {
    /// Parts of up to `size` tokens.
    pub fn split(self, size: usize) -> impl ExactSizeIterator<Item = RowsMut<'a, T>> + Send {
        let end = self.range.end;
        let starts = self.range.clone().step_by(size);
        starts.map(move |start| self.part(start..end.min(start + size)))
    }

    fn part(&self, range: Range<usize>) -> Self {
        RowsMut { range, ..*self }
    }

    pub fn tokens(&self) -> impl Iterator<Item = [usize; 2]> {
        let num_b = self.grid[1];
        self.range.clone().map(move |token| [token / num_b, token % num_b])
    }

    #[inline(always)]
    pub fn row_mut(&mut self, [a, b, c]: [usize; 3]) -> &mut [T] {
        assert!(self.range.contains(&(a * self.grid[1] + b)) && b < self.grid[1] && c < self.grid[2]);
        let offset = a * self.strides[0] + b * self.strides[1] + c * self.strides[2];
        // SAFETY: `rows_mut` made sure of the memory of all rows of the grid, and that no two overlap. This row is of
        // the range, which is nobody else's, and `self` stays borrowed with it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), self.width) }
    }
}
