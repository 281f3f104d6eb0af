//! The ORPO head: from hidden states to log-probabilities, loss and gradients, without ever
//! holding the logits of the batch.
//!
//! [`orpo::orpo`] is the fused loss, [`logps::forward`] and [`logps::backward`] the log-probabilities
//! alone. Both run on an [`engine::Engine`], which sweeps the vocabulary in tiles; [`plan`] chooses
//! what is kept between sweeps; [`row`] has the vector code. [`odds_ratio`] is the term that compares the
//! two answers of a pair, with its gradient.

pub mod engine;
pub mod layout;
pub mod logps;
pub mod odds_ratio;
pub mod orpo;
pub mod plan;
pub mod row;
pub mod scores;
pub mod weight;

#[cfg(test)]
mod tests;
