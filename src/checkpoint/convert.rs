//! Converts a checkpoint: each tensor by its rule.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::bytes::Plain;
use super::collection::{Collection, Found};
use super::engine::ConvertEngine;
use super::file::TensorFile;
use super::layout::{Layout, LayoutEntry};
use super::low_rank::LowRank;
use super::output::{Disk, Output};
use super::rule::{Target, TensorRule};
use super::sink::{Sink, items};
use super::source::TensorSource;
use super::state::PARTS;
use crate::base::error::{Error, Result};
use crate::base::float::Dtype;
use crate::quant::BLOCK_SIZES;

/// Bytes that are read before the disk starts to write their results.
const DISK: usize = 128 << 20;

/// What to convert, and how.
#[derive(Debug)]
pub struct Job<'a> {
    /// The checkpoint.
    pub base: &'a Collection,
    /// The adapter, if rules name tensors of one.
    pub adapter: Option<&'a Collection>,
    /// Rules for tensors; those without a rule are copied, with their quantisation entries.
    pub rules: Vec<TensorRule>,
    /// One new file per file of the base.
    pub outputs: Vec<PathBuf>,
}

/// A written file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Names of its tensors.
    pub names: Vec<String>,
    /// Bytes of its tensors, at most.
    pub len: usize,
}

/// Called with the number of bytes of the base that were converted since the last call.
pub type Progress<'a> = dyn FnMut(usize) -> Result<()> + 'a;

/// Runs a job.
///
/// # Errors
/// A rule that does not fit its tensor, a value that is quantised or changed and not finite, a damaged file,
/// and errors of the system. Rules are checked before the first file is created; created files are not
/// removed.
pub fn convert(
    job: &Job<'_>,
    engine: &ConvertEngine<'_>,
    progress: &mut Progress<'_>,
) -> Result<Vec<Written>> {
    let plan = ConvertPlan::new(job)?;
    let (disk, mut written) = (Disk::start(), Vec::new());
    for (file, path) in job.base.files().iter().zip(&job.outputs) {
        let names = file.in_order();
        let layout = Layout::new(names.iter().flat_map(|name| plan.items(file, name)).collect())?;
        let names_after = layout.names().map(str::to_owned).collect();
        let summary = Written { names: names_after, len: layout.len() };
        let mut output = Output::create(path, layout)?;
        let mut waiting = 0;
        for name in names {
            plan.write(file, name, engine, &mut output, progress)?;
            waiting += file.entries()[name].len;
            if waiting >= DISK {
                disk.begin(&output)?;
                waiting = 0;
            }
        }
        output.finish()?;
        disk.complete(&output)?;
        written.push(summary);
    }
    disk.wait()?;
    Ok(written)
}

/// The most bytes that the files of a job can take.
///
/// # Errors
/// As [`convert`] before it creates the first file.
pub fn size(job: &Job<'_>) -> Result<usize> {
    let plan = ConvertPlan::new(job)?;
    let mut len = 0;
    for file in job.base.files() {
        let items = file.in_order().into_iter().flat_map(|name| plan.items(file, name)).collect();
        len += Layout::new(items)?.len();
    }
    Ok(len)
}

/// A rule that fits its tensor. Scales of 4-bit tensors are read again when the tensor is converted: the
/// scales of all tensors would fill memory.
struct ConvertStep<'a> {
    rule: &'a TensorRule,
    /// Sizes before and after.
    from: Vec<usize>,
    to: Vec<usize>,
}

struct ConvertPlan<'a> {
    job: &'a Job<'a>,
    steps: BTreeMap<&'a str, ConvertStep<'a>>,
    /// Entries of quantised tensors that are replaced.
    gone: BTreeSet<String>,
}

fn unfit(name: &str, argument: &'static str, expected: &str, got: String) -> Error {
    Error::Value { op: "checkpoint", argument, expected: expected.into(), got }.about(name)
}

impl<'a> ConvertPlan<'a> {
    fn new(job: &'a Job<'a>) -> Result<Self> {
        if job.outputs.len() != job.base.files().len() {
            let (got, files) = (job.outputs.len(), job.base.files().len());
            return Err(Error::Internal(format!("{got} outputs for {files} files")));
        }
        let mut plan = Self { job, steps: BTreeMap::new(), gone: BTreeSet::new() };
        for rule in &job.rules {
            let before = TensorSource::open(job.base, &rule.name)?;
            if before.state.is_some() {
                plan.gone.extend(PARTS.iter().map(|part| format!("{}{part}", rule.name)));
            }
            let source = plan.source(rule)?;
            if source.shape() != before.shape() {
                let name = rule.replacement.as_ref().unwrap_or(&rule.name);
                let expected = format!("{:?}, as the base has it", before.shape());
                let got = format!("{:?}", source.shape());
                return Err(unfit(name, "the shape of a replacement", &expected, got));
            }
            let step = plan.step(rule, &source)?;
            if plan.steps.insert(&rule.name, step).is_some() {
                return Err(Error::Internal(format!("two rules for {:?}", rule.name)));
            }
        }
        Ok(plan)
    }

    fn adapter(&self) -> Result<&'a Collection> {
        self.job.adapter.ok_or_else(|| Error::Internal("a rule without its adapter".into()))
    }

    fn source(&self, rule: &TensorRule) -> Result<TensorSource<'a>> {
        match &rule.replacement {
            None => TensorSource::open(self.job.base, &rule.name),
            Some(name) => TensorSource::open(self.adapter()?, name),
        }
    }

    fn step(&self, rule: &'a TensorRule, source: &TensorSource<'a>) -> Result<ConvertStep<'a>> {
        let from = source.shape().to_vec();
        let mut to = from.clone();
        if rule.transposed {
            if from.len() != 2 {
                return Err(unfit(&rule.name, "shape", "a matrix", format!("{from:?}")));
            }
            to.reverse();
        }
        if let Target::Nf4 { blocksize, .. } = rule.target {
            if !BLOCK_SIZES.contains(&blocksize) {
                let allowed = "32, 64, 128, 256, 512, 1024, 2048 or 4096";
                return Err(unfit(&rule.name, "blocksize", allowed, blocksize.to_string()));
            }
            if from.len() != 2 || from.contains(&0) {
                return Err(unfit(&rule.name, "shape", "a matrix with values", format!("{from:?}")));
            }
        }
        let step = ConvertStep { rule, from, to };
        step.low_rank(self)?;
        Ok(step)
    }

    fn items(&self, file: &TensorFile, name: &str) -> Vec<LayoutEntry> {
        match self.steps.get(name) {
            Some(step) => items(name, &step.to, step.rule.target),
            None if self.gone.contains(name) => Vec::new(),
            None => {
                let entry = &file.entries()[name];
                vec![LayoutEntry::new(name.into(), entry.kind, entry.shape.clone())]
            }
        }
    }

    fn write(
        &self,
        file: &TensorFile,
        name: &str,
        engine: &ConvertEngine<'_>,
        output: &mut Output,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let entry = &file.entries()[name];
        match self.steps.get(name) {
            Some(step) => step.write(self, engine, output, entry.len, progress),
            None if self.gone.contains(name) => progress(entry.len),
            None => copy(Found { file, entry }, name, 2 * engine.chunk, output, progress),
        }
    }
}

fn copy(
    found: Found<'_>,
    name: &str,
    chunk: usize,
    output: &Output,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let Found { file, entry } = found;
    for start in (0..entry.len).step_by(chunk) {
        let end = entry.len.min(start + chunk);
        let window = file.window(entry, start..end)?;
        file.prefetch(entry, end..end + chunk);
        output.write(name, start, &window)?;
        progress(end - start)?;
    }
    Ok(())
}

impl ConvertStep<'_> {
    fn sizes(&self) -> (usize, usize) {
        let columns = if self.from.len() < 2 { 1 } else { self.from[self.from.len() - 1] };
        (self.from.iter().product::<usize>() / columns.max(1), columns)
    }

    fn low_rank(&self, plan: &ConvertPlan<'_>) -> Result<Option<LowRank>> {
        let (rows, columns) = self.sizes();
        let update = self.rule.update.as_ref();
        update.map(|update| LowRank::read(plan.adapter()?, update, rows, columns)).transpose()
    }

    /// Values in a chunk: full rows if rows are changed, and full blocks.
    fn chunk(&self, usual: usize) -> usize {
        const BLOCK: usize = BLOCK_SIZES[BLOCK_SIZES.len() - 1];
        if self.rule.update.is_none() {
            return usual;
        }
        let (_, columns) = self.sizes();
        let rows = BLOCK >> columns.max(1).trailing_zeros().min(BLOCK.trailing_zeros());
        rows * columns * (usual / (rows * columns).max(1)).max(1)
    }

    fn write(
        &self,
        plan: &ConvertPlan<'_>,
        engine: &ConvertEngine<'_>,
        output: &mut Output,
        len: usize,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let strict = self.rule.update.is_some();
        let mut sink = Sink::new(&self.rule.name, &self.to, self.rule.target, strict);
        let (source, low_rank) = (plan.source(self.rule)?, self.low_rank(plan)?);
        let count: usize = self.from.iter().product();
        let mut told = 0;
        let mut tell = |done: usize| {
            let now = if count == 0 { len } else { (done as u128 * len as u128 / count as u128) as usize };
            let news = now - told;
            told = now;
            progress(news)
        };
        let same = source.state.is_none()
            && low_rank.is_none()
            && !self.rule.transposed
            && source.dtype() == self.rule.target.dtype();
        // All of the matrix for a transpose: the models that store weights transposed are small.
        let chunk = if self.rule.transposed { count.max(1) } else { self.chunk(engine.chunk) };
        for start in (0..count).step_by(chunk) {
            let size = chunk.min(count - start);
            if same {
                direct(&source, (start, size), engine, output, &mut sink)?;
            } else {
                let mut wide = vec![0.0; size];
                source.read(engine.threads, start, &mut wide)?;
                if let Some(low_rank) = &low_rank {
                    let (_, columns) = self.sizes();
                    low_rank.apply(engine.threads, engine.gemm, start / columns, &mut wide)?;
                }
                if self.rule.transposed {
                    wide = transpose(&wide, self.sizes().1);
                }
                sink.write(engine, output, start, &wide)?;
            }
            tell(start + size)?;
        }
        if count == 0 {
            tell(0)?;
        }
        sink.finish(engine, output)
    }
}

/// Values that keep their dtype, written without a copy.
fn direct(
    source: &TensorSource<'_>,
    place: (usize, usize),
    engine: &ConvertEngine<'_>,
    output: &Output,
    sink: &mut Sink<'_>,
) -> Result<()> {
    fn run<T: Plain>(
        source: &TensorSource<'_>,
        (start, size): (usize, usize),
        engine: &ConvertEngine<'_>,
        output: &Output,
        sink: &mut Sink<'_>,
    ) -> Result<()> {
        source.direct::<T, ()>(start, size, |values| sink.write_as(engine, output, start, values))
    }
    match source.dtype() {
        Dtype::F32 => run::<f32>(source, place, engine, output, sink),
        Dtype::F16 => run::<half::f16>(source, place, engine, output, sink),
        Dtype::Bf16 => run::<half::bf16>(source, place, engine, output, sink),
    }
}

fn transpose(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    let mut turned = vec![0.0; values.len()];
    for (i, row) in values.chunks_exact(columns).enumerate() {
        for (j, &x) in row.iter().enumerate() {
            turned[j * rows + i] = x;
        }
    }
    turned
}
