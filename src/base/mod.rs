//! What all modules share: errors, threads, matrix products, vector code, element types.
//!
//! [`error`] has every error in one table; [`threads`] and [`gemm`] are the traits that callers supply, and
//! [`portable`] implements them without torch; [`simd`] picks vector instructions; [`float`] has the element
//! types of models and [`real`] those that the head computes in; [`huge_pages`] saves page faults.

pub mod error;
pub mod float;
pub mod gemm;
pub mod huge_pages;
pub mod portable;
pub mod real;
pub mod simd;
pub mod threads;
