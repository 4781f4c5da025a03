//! Threads for work on tensors: torch's own. Those of its OpenMP wait for the next operation by spinning, so that any
//! other thread would first have to wait for a core, for milliseconds where torch has them all.

use std::sync::Mutex;

const PARTS_OF_A_THREAD: usize = 8; // without OpenMP, to be worth a start

/// The parts that are left, and what to do with one.
struct Job<I, F> {
    parts: Mutex<I>,
    work: F,
}

impl<I: Iterator, F: Fn(I::Item)> Job<I, F> {
    fn next(&self) -> Option<I::Item> {
        self.parts.lock().unwrap().next()
    }

    /// What each thread does.
    fn run(&self) {
        while let Some(part) = self.next() {
            (self.work)(part);
        }
    }
}

/// work(part) for each part, on up to num_threads threads, the caller's among them. As with torch's own operations, a
/// process that has used several cannot do so again after a fork.
pub fn for_each<I, F>(parts: I, num_threads: usize, work: F)
where
    I: ExactSizeIterator + Send,
    F: Fn(I::Item) + Sync,
{
    let (count, job) = (parts.len(), Job { parts: Mutex::new(parts), work });
    // all threads, however few parts there are: OpenMP would end those left over, and torch would start them again
    #[cfg(target_os = "linux")]
    if num_threads > 1 && count > 1 && openmp::run(&job, num_threads) {
        return;
    }
    std::thread::scope(|scope| {
        for _ in 1..num_threads.min(count / PARTS_OF_A_THREAD) {
            scope.spawn(|| job.run());
        }
        job.run();
    });
}

#[cfg(target_os = "linux")]
mod openmp {
    use super::Job;
    use std::ffi::{c_char, c_uint, c_void};
    use std::sync::OnceLock;

    extern "C" {
        fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void; // of the C library
    }

    /// What a compiler makes of `#pragma omp parallel`; GNU's, LLVM's and Intel's libraries all have it. Found is the
    /// first that the process has loaded for all to see, which torch does with the one that it uses.
    type GompParallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

    extern "C" fn on_a_thread<I: Iterator, F: Fn(I::Item)>(job: *mut c_void) {
        unsafe { &*(job as *const Job<I, F>) }.run() // which outlives the call below, and may be shared
    }

    /// False where the process has no OpenMP.
    pub fn run<I: Iterator + Send, F: Fn(I::Item) + Sync>(job: &Job<I, F>, num_threads: usize) -> bool {
        static PARALLEL: OnceLock<Option<GompParallel>> = OnceLock::new();
        let found = PARALLEL.get_or_init(|| unsafe {
            let address = dlsym(std::ptr::null_mut(), c"GOMP_parallel".as_ptr());
            (!address.is_null()).then(|| std::mem::transmute::<*mut c_void, GompParallel>(address))
        });
        let Some(parallel) = found else { return false };
        unsafe { parallel(on_a_thread::<I, F>, job as *const Job<I, F> as *mut c_void, num_threads as c_uint, 0) };
        true
    }
}
