use super::loss::{loss_of_f32, Rows};

#[test]
fn the_gradient_is_the_slope_of_the_loss() {
    let (rows, width, cap) = (3, 77, 15.0);
    let mut seed = 7;
    let logits: Vec<f32> = (0..rows * width).map(|_| random(&mut seed, 4000) as f32 / 100.0 - 20.0).collect();
    let (targets, weights) = ([5, 0, 76], [1.0, 0.5, 2.0]);
    let loss = |row: usize, bump: Option<usize>| {
        let capped = (0..width).map(|i| {
            let x = logits[row * width + i] as f64 + if bump == Some(i) { 1e-4 } else { 0.0 };
            cap * (x / cap).tanh()
        });
        let capped: Vec<f64> = capped.collect();
        weights[row] as f64 * (capped.iter().map(|x| x.exp()).sum::<f64>().ln() - capped[targets[row] as usize])
    };
    for num_threads in [1, 2, 8] {
        let (mut gradient, mut losses) = (logits.clone(), [0.0; 3]);
        let batch = Rows { logits: &mut gradient, targets: &targets, weights: &weights, losses: &mut losses };
        loss_of_f32(batch, cap as f32, num_threads);
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
