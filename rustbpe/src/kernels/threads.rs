//! Threads for work on tensors: torch's own. Those of its OpenMP wait for the next operation by spinning, so any other
//! thread would first have to wait for a core: for milliseconds, where torch has them all.

use std::sync::Mutex;

const PARTS_OF_A_THREAD: usize = 8; // without OpenMP, to be worth the start of a thread

/// The parts that are left, and the work to do on each.
struct Job<I, F> {
    parts: Mutex<I>,
    work: F,
}

impl<I: Iterator, F: Fn(I::Item)> Job<I, F> {
    fn next(&self) -> Option<I::Item> {
        self.parts.lock().unwrap().next()
    }

    /// The work of one thread.
    fn run(&self) {
        while let Some(part) = self.next() {
            (self.work)(part);
        }
    }
}

/// work(part) for each part, on up to num_threads threads, the caller's among them. As with torch's own operations, a
/// process that has used several threads cannot do so again after a fork.
pub fn for_each<I, F>(parts: I, num_threads: usize, work: F)
where
    I: ExactSizeIterator + Send,
    F: Fn(I::Item) + Sync,
{
    let count = parts.len();
    let job = Job { parts: Mutex::new(parts), work };
    // All threads, however few the parts are: OpenMP would end those left over, and torch would start them again
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

    /// The call that compilers make of `#pragma omp parallel`: (function, its argument, threads, flags). GNU's, LLVM's
    /// and Intel's libraries have it.
    type GompParallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

    extern "C" fn run_on_thread<I: Iterator, F: Fn(I::Item)>(job: *mut c_void) {
        // SAFETY: `run` passes a job of this type, which outlives its call; it is `Sync` by the bounds there.
        unsafe { &*(job as *const Job<I, F>) }.run()
    }

    /// False where the process has no OpenMP.
    pub fn run<I: Iterator + Send, F: Fn(I::Item) + Sync>(job: &Job<I, F>, num_threads: usize) -> bool {
        static PARALLEL: OnceLock<Option<GompParallel>> = OnceLock::new();
        // SAFETY: the null handle means the libraries that are loaded for all to see, the first of them that has the
        // name, which is the one that torch uses; the name ends in a null byte.
        let find = || unsafe { dlsym(std::ptr::null_mut(), c"GOMP_parallel".as_ptr()) };
        // SAFETY: a function of this name has this signature; `Option` makes None of a null address.
        let found =
            PARALLEL.get_or_init(|| unsafe { std::mem::transmute::<*mut c_void, Option<GompParallel>>(find()) });
        let Some(parallel) = found else { return false };
        let argument = job as *const Job<I, F> as *mut c_void;
        // SAFETY: the call returns when all threads have done with the job, which the caller holds.
        unsafe { parallel(run_on_thread::<I, F>, argument, num_threads as c_uint, 0) };
        true
    }
}
