//! The allocator's settings.

/// mimalloc's `mi_option_purge_delay`, which its bindings do not name.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Keeps freed memory for the next step, where mimalloc is the program's allocator: a step frees and asks for the
/// same sizes as the one before, and memory given back to the system in between costs a page fault for every page
/// of every activation. To be called once, before there is work.
#[allow(unsafe_code)]
pub fn keep() {
    // SAFETY: the call sets an integer in the allocator's table of options and reads no memory of ours.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}
