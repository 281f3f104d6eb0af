//! Arbitrary files: the readers return a file or an error, never a panic.

use proptest::prelude::*;

use super::*;

proptest! {
    /// No file makes the reader panic, and an accepted file can be read.
    #[test]
    fn any_bytes_are_a_file_or_an_error(mut content: Vec<u8>, length in any::<Option<u8>>()) {
        if let (Some(length), true) = (length, content.len() >= 8) {
            content[..8].copy_from_slice(&u64::from(length).to_le_bytes());
        }
        read_all(&content);
    }

    /// Well-formed headers, with sizes that sometimes fit the file.
    #[test]
    fn any_header_is_a_file_or_an_error(
        tensors in prop::collection::vec(
            (
                prop::sample::select(vec!["w", "w.absmax", "w.quant_map", "w.nested_absmax", JSON, "x", ""]),
                prop::sample::select(vec!["F32", "BF16", "U8", "I8", "F4", "F8_E4M3", "BOOL", "F128"]),
                prop::collection::vec(prop_oneof![0u64..9, any::<u64>()], 0..4),
                prop::option::weighted(0.2, any::<(u64, u64)>()),
            ),
            0..5,
        ),
        surplus in 0usize..2,
    ) {
        let (mut at, mut parts) = (0u64, Vec::new());
        for (name, kind, shape, offsets) in tensors {
            let bits = match kind { "F32" => 32u64, "BF16" => 16, "F4" => 4, _ => 8 };
            let len = shape.iter().try_fold(bits, |product, size| product.checked_mul(*size)).unwrap_or(0) / 8;
            let end = at.saturating_add(len);
            let (from, to) = offsets.unwrap_or((at, end));
            if end < 100_000 {
                at = end;
            }
            parts.push(format!(
                "{name:?}:{{\"dtype\":{kind:?},\"shape\":{shape:?},\"data_offsets\":[{from},{to}]}}"
            ));
        }
        let header = format!("{{{}}}", parts.join(","));
        let mut content = (header.len() as u64).to_le_bytes().to_vec();
        content.extend_from_slice(header.as_bytes());
        content.resize(content.len() + at as usize + surplus, 0x77);
        read_all(&content);
    }

    #[test]
    fn a_changed_file_is_a_file_or_an_error(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
        double: bool,
    ) {
        let mut content = whole_file(double);
        for (place, byte) in changes {
            let place = place.index(content.len());
            content[place] = byte;
        }
        if let Some(cut) = cut {
            content.truncate(cut.index(content.len()));
        }
        read_all(&content);
    }

    /// Other texts instead of the JSON: an accepted state has the sizes that the text gives.
    #[test]
    fn any_json_is_a_state_or_an_error(
        (key, value) in (
            prop::sample::select(vec!["blocksize", "dtype", "shape", "nested_blocksize", "nested_offset", "quant_type"]),
            prop_oneof![
                any::<i64>().prop_map(serde_json::Value::from),
                any::<f64>().prop_map(serde_json::Value::from),
                prop::sample::select(vec![32, 64, 128, 4096]).prop_map(serde_json::Value::from),
                ".{0,8}".prop_map(serde_json::Value::from),
                prop::collection::vec(any::<u64>(), 0..4).prop_map(serde_json::Value::from),
                prop::collection::vec(0u64..200, 0..4).prop_map(serde_json::Value::from),
                Just(serde_json::Value::Null),
            ],
        ),
        double: bool,
    ) {
        let file = whole_file(double);
        let read = SafeTensors::deserialize(&file).expect("whole");
        let text = read.tensor(JSON).expect("it").data();
        let mut json: serde_json::Value = serde_json::from_slice(text).expect("JSON");
        json[key] = value;
        let text = json.to_string().into_bytes();
        let tensors: Vec<Made> = read.tensors().into_iter().map(|(name, view)| {
            let data = if name == JSON { text.clone() } else { view.data().to_vec() };
            let shape = if name == JSON { vec![text.len()] } else { view.shape().to_vec() };
            (name, view.dtype(), shape, data)
        }).collect();
        let folder = folder();
        read_all(&std::fs::read(write(folder.path(), "x", &tensors)).expect("it"));
    }

    /// For any shape, the file has the same codes as quantising the tensor at once, and can be read back.
    #[test]
    fn any_matrix_is_quantised_whole(
        rows in 1usize..90, columns in 1usize..90, power in 5u32..13, double: bool, seed: u32,
    ) {
        let folder = folder();
        let weight: Vec<f32> = wave(rows * columns).iter().map(|x| x * (1.0 + (seed % 97) as f32)).collect();
        let base = [made("w", Kind::F32, &[rows, columns], bytes(&weight))];
        let blocksize = 1 << power;
        let file = run(folder.path(), &base, &[], vec![to_nf4("w", Dtype::F32, blocksize, double)]).expect("a file");
        prop_assert_eq!(data(&file, "w"), &packed(&weight, blocksize).0[..]);
        let source = Collection::open(&[folder.path().join("out")]).expect("a file");
        let state = State::read(&source, "w").expect("a state").expect("quantised");
        prop_assert_eq!(state.scales(0, rows * columns).len(), (rows * columns).div_ceil(blocksize));
        prop_assert_eq!(state.double(), double);
    }
}

/// A file with a small 4-bit weight and a plain one.
fn whole_file(double: bool) -> Vec<u8> {
    use std::sync::OnceLock;
    static FILES: [OnceLock<Vec<u8>>; 2] = [OnceLock::new(), OnceLock::new()];
    let make = || {
        let folder = folder();
        let base = [
            made("w", Kind::BF16, &[3, 70], bytes(&narrow(&wave(210)))),
            made("n", Kind::F32, &[2], bytes(&wave(2))),
        ];
        run(folder.path(), &base, &[], vec![to_nf4("w", Dtype::Bf16, 64, double)]).expect("a file")
    };
    FILES[usize::from(double)].get_or_init(make).clone()
}

/// Opens a file with this content, and reads every tensor and state if that works.
fn read_all(content: &[u8]) {
    let folder = folder();
    let path = folder.path().join("x");
    std::fs::write(&path, content).expect("a disk");
    let Ok(collection) = Collection::open(&[&path]) else {
        return;
    };
    let file = &collection.files()[0];
    for (name, entry) in file.entries() {
        assert_eq!(file.whole(entry).expect("bytes").len(), entry.len);
        if let Ok(Some(state)) = State::read(&collection, name) {
            assert_eq!(entry.len, state.count().div_ceil(2));
            let blocks = state.count().div_ceil(state.blocksize);
            assert_eq!(state.scales(0, state.count()).len(), blocks);
        }
        let rules = vec![to_float(name, Dtype::F32)];
        let job = Job { base: &collection, adapter: None, rules, outputs: vec![folder.path().join("y")] };
        let _ = size(&job);
    }
}
