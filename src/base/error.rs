//! All errors, in one table.

use std::fmt;

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// An invalid argument, or a failure of a library or the system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// A tensor of the wrong shape.
    Shape {
        /// The op that was called.
        op: &'static str,
        /// The argument's name.
        argument: &'static str,
        /// What is allowed.
        expected: String,
        /// What came.
        got: String,
    },
    /// A value out of range.
    Value {
        /// The op that was called.
        op: &'static str,
        /// The argument's name.
        argument: &'static str,
        /// What is allowed.
        expected: String,
        /// What came.
        got: String,
    },
    /// A tensor of the wrong dtype.
    Dtype {
        /// The op that was called.
        op: &'static str,
        /// The argument's name.
        argument: &'static str,
        /// What is allowed.
        expected: String,
        /// What came.
        got: String,
    },
    /// A row of a dataset that cannot be used.
    Row {
        /// The dataset's name and the row's index.
        row: String,
        /// The field, what is wrong with it and what to do.
        fault: String,
    },
    /// What the tokenizer library reported.
    Tokenizer(String),
    /// A file that is not what it should be.
    File {
        /// The file.
        path: String,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// A file that cannot be read or written.
    Io {
        /// The file.
        path: String,
        /// The error number of the system.
        code: Option<i32>,
        /// The error message of the system.
        message: String,
    },
    /// The caller has asked to stop.
    Stopped,
    /// What libtorch reported.
    Torch(String),
    /// What the CUDA driver or compiler reported.
    Cuda {
        /// The kernel's name; empty if none.
        kernel: String,
        /// Grid, block and shared memory.
        launch: String,
        /// The report.
        message: String,
    },
    /// A bug of this library.
    Internal(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Shape { op, argument, expected, got } => {
                write!(f, "{op}: {argument} has shape {got}; must be {expected}")
            }
            Error::Value { op, argument, expected, got } => {
                write!(f, "{op}: {argument} is {got}; must be {expected}")
            }
            Error::Dtype { op, argument, expected, got } => {
                write!(f, "{op}: {argument} has dtype {got}; must be {expected}")
            }
            Error::Row { row, fault } => write!(f, "{row}: {fault}"),
            Error::Tokenizer(message) => write!(f, "tokenizer: {message}"),
            Error::File { path, problem } => write!(f, "{path}: {problem}"),
            Error::Io { path, message, .. } => write!(f, "{path}: {message}"),
            Error::Stopped => write!(f, "stopped"),
            Error::Torch(message) => write!(f, "libtorch: {message}"),
            Error::Cuda { kernel, message, .. } if kernel.is_empty() => write!(f, "CUDA: {message}"),
            Error::Cuda { kernel, launch, message } => {
                write!(f, "CUDA kernel {kernel}, {launch}: {message}")
            }
            Error::Internal(message) => write!(f, "internal error, please report it: {message}"),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    /// An error of the system, with its file.
    #[must_use]
    pub fn io(path: &std::path::Path, error: &std::io::Error) -> Self {
        let path = path.display().to_string();
        // Without " (os error 28)": the number is kept separately.
        let text = error.to_string();
        let message = text.split(" (os error").next().unwrap_or_default().to_owned();
        Error::Io { path, code: error.raw_os_error(), message }
    }

    /// A value out of range.
    #[must_use]
    pub fn value(op: &'static str, argument: &'static str, expected: &str, got: &impl ToString) -> Self {
        Error::Value { op, argument, expected: expected.into(), got: got.to_string() }
    }

    /// Adds the tensor's name to an error about a value.
    #[must_use]
    pub fn about(self, name: &str) -> Self {
        match self {
            Error::Value { op, argument, expected, got } => {
                Error::Value { op, argument, expected, got: format!("{got} of {name}") }
            }
            other => other,
        }
    }
}

#[cfg(feature = "torch")]
impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        let text = match error {
            tch::TchError::Torch(text) => text,
            other => other.to_string(),
        };
        // libtorch's stack trace of twenty lines follows.
        let end = text.find("\nException raised from").unwrap_or(text.len());
        Error::Torch(text[..end].to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::Error;

    #[test]
    fn messages_name_argument_value_and_what_is_allowed() {
        let error =
            Error::Shape { op: "linear_orpo", argument: "bias", expected: "(7,)".into(), got: "[3]".into() };
        assert_eq!(error.to_string(), "linear_orpo: bias has shape [3]; must be (7,)");
        let error = Error::Dtype { op: "op", argument: "x", expected: "int64".into(), got: "bool".into() };
        assert_eq!(error.to_string(), "op: x has dtype bool; must be int64");
        let error = Error::Row { row: "train_dataset row 3".into(), fault: "prompt is missing".into() };
        assert_eq!(error.to_string(), "train_dataset row 3: prompt is missing");
        assert_eq!(Error::Tokenizer("no model".into()).to_string(), "tokenizer: no model");
        let cuda = |kernel: &str| Error::Cuda {
            kernel: kernel.into(),
            launch: "grid (1, 2, 3)".into(),
            message: "no".into(),
        };
        assert_eq!(cuda("nf4_x").to_string(), "CUDA kernel nf4_x, grid (1, 2, 3): no");
        assert_eq!(cuda("").to_string(), "CUDA: no");
    }
    #[cfg(feature = "torch")]
    #[test]
    fn libtorch_s_report_comes_without_its_stack() {
        let raw = tch::TchError::Torch("sizes differ\nException raised from meta at x.cpp:1".into());
        assert_eq!(Error::from(raw).to_string(), "libtorch: sizes differ");
        let matrix = tch::Tensor::zeros([2, 3], (tch::Kind::Float, tch::Device::Cpu));
        let raw = matrix.f_matmul(&matrix).expect_err("2x3 times 2x3");
        let message = Error::from(raw).to_string();
        assert!(message.starts_with("libtorch: aten::matmul: "), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
    }
}
