//! The CUDA bodies of the ops against their references on the CPU, and runs on a GPU against runs on the CPU.
//!
//! Where no GPU is found each test prints one line and ends.

#![cfg(feature = "cuda")]

mod activations;
mod adapters;
mod attention;
mod beside;
mod device;
mod images;
mod language;
mod losses;
mod optim;
mod packed;
mod quant;
mod rows;
mod runs;
