use super::loss::capped_cross_entropy;
use super::tensor::{Dtype, Tensor};

/// A contiguous tensor over the elements of a vector, which has to outlive it.
fn tensor<T>(elements: &mut [T], dtype: Dtype, rows: usize, width: usize) -> Tensor {
    assert_eq!(elements.len(), rows * width);
    // SAFETY: the vector is there until the end of the test that asks for the tensor.
    unsafe { Tensor::new(elements.as_mut_ptr() as usize, dtype, [1, 1, rows, width], [0, 0, width, 1]) }.unwrap()
}

#[test]
fn the_gradient_is_the_slope_of_the_loss() {
    let (rows, width, cap) = (3, 77, 15.0);
    let logits: Vec<f32> = (0..rows * width).map(|i| (i * 7919 % 4000) as f32 / 100.0 - 20.0).collect();
    let targets = [5i64, 0, 76];
    let weights = [1f32, 0.5, 2.0];
    let loss = |row: usize, bump: Option<usize>| {
        let capped = (0..width).map(|i| {
            let x = logits[row * width + i] as f64 + if bump == Some(i) { 1e-4 } else { 0.0 };
            cap * (x / cap).tanh()
        });
        let capped: Vec<f64> = capped.collect();
        weights[row] as f64 * (capped.iter().map(|x| x.exp()).sum::<f64>().ln() - capped[targets[row] as usize])
    };
    for num_threads in [1, 2, 8] {
        let mut gradient = logits.clone();
        let mut losses = [0f32; 3];
        let (mut targets, mut weights) = (targets, weights);
        let tensors = [
            tensor(&mut gradient, Dtype::Float32, rows, width),
            tensor(&mut targets, Dtype::Int64, 1, rows),
            tensor(&mut weights, Dtype::Float32, 1, rows),
            tensor(&mut losses, Dtype::Float32, 1, rows),
        ];
        capped_cross_entropy::<f32>(tensors, cap as f32, num_threads).unwrap();
        for row in 0..rows {
            assert!((losses[row] as f64 - loss(row, None)).abs() < 1e-5);
            for i in 0..width {
                let slope = (loss(row, Some(i)) - loss(row, None)) / 1e-4;
                assert!((gradient[row * width + i] as f64 - slope).abs() < 1e-3, "row {row}, column {i}");
            }
        }
    }
}

#[test]
fn every_part_is_done_once_on_any_number_of_threads() {
    for num_threads in 1..5 {
        let mut done = [0; 100];
        super::threads::for_each(done.iter_mut(), num_threads, |count| *count += 1);
        assert_eq!(done, [1; 100]);
    }
    super::threads::for_each(0..0, 2, |_| unreachable!());
}
