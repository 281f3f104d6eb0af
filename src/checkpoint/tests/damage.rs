//! Files that are damaged or do not fit together: the error names the file.

use super::super::file::TensorFile;
use super::*;

#[test]
fn a_name_is_in_one_file() {
    let folder = folder();
    let tensor = [made("w", Kind::U8, &[1], &[1])];
    let paths = [write(folder.path(), "x", &tensor), write(folder.path(), "y", &tensor)];
    let message = Collection::open(&paths).expect_err("twice").to_string();
    assert!(message.contains("has a tensor \"w\" that"), "{message}");
    let message = Collection::open(&[folder.path().join("z")]).expect_err("none").to_string();
    assert!(message.ends_with("z: No such file or directory"), "{message}");
}

#[test]
fn damaged_files_are_refused() {
    let folder = folder();
    let path = write(folder.path(), "x", &[made("w", Kind::F32, &[4], bytes(&wave(4)))]);
    let whole = std::fs::read(&path).expect("it");
    let open = |content: &[u8]| {
        std::fs::write(&path, content).expect("a disk");
        TensorFile::open(&path).expect_err("damaged").to_string()
    };
    assert!(open(&[]).contains("has 0 bytes, too few"));
    assert!(open(&whole[..whole.len() - 1]).contains("is truncated or too long"));
    assert!(open(&[whole.clone(), vec![0]].concat()).contains("is truncated or too long"));
    assert!(open(&whole[..20]).contains("its header would end after byte 20"));
    assert!(open(b"PK\x03\x04 an archive of pickles").contains("is not a safetensors file"));
    let text = String::from_utf8_lossy(&whole[8..]).replace("[4]", "[5]").into_bytes();
    assert!(open(&[&whole[..8], &text[..]].concat()).contains("invalid shape, data type, or offset"));
    // A file that shrinks while it is read.
    std::fs::write(&path, &whole).expect("a disk");
    let file = TensorFile::open(&path).expect("whole again");
    std::fs::write(&path, &whole[..whole.len() - 4]).expect("a disk");
    let message = file.whole(&file.entries()["w"]).expect_err("shorter").to_string();
    assert!(message.contains("fewer than when it was opened"), "{message}");
}

/// The error message for a 4-bit weight with changed parts.
fn refused(change: impl Fn(&mut Vec<Made>)) -> String {
    let folder = folder();
    let (_, mut tensors) = four_bit(folder.path(), true);
    change(&mut tensors);
    let file = Collection::open(&[write(folder.path(), "changed", &tensors)]).expect("a file");
    State::read(&file, "w").expect_err("no state").to_string()
}

fn part<'a>(tensors: &'a mut [Made], name: &str) -> &'a mut Made {
    tensors.iter_mut().find(|made| made.0 == name).expect(name)
}

fn refused_json(from: &str, to: &str) -> String {
    refused(|tensors| {
        let made = part(tensors, JSON);
        let text = String::from_utf8(made.3.clone()).expect("text").replace(from, to);
        (made.2, made.3) = (vec![text.len()], text.into_bytes());
    })
}

#[test]
fn states_that_do_not_fit_are_refused_by_name() {
    let cases = [
        (refused_json("130", "131"), "shape [70, 131], which does not fit the 4550 bytes of codes"),
        (refused_json("[70, 130]", "[70, -130]"), "shape of quant_state is [70,-130]"),
        (refused_json("70", "18446744073709551615"), "which does not fit"),
        (refused_json("\"blocksize\": 64", "\"blocksize\": 48"), "blocksize of quant_state is 48"),
        (
            refused_json("\"blocksize\": 64", "\"blocksize\": 128"),
            "absmax has 143 elements; must be 72, one per block",
        ),
        (refused_json("bfloat16", "float64"), "dtype of quant_state is \"float64\""),
        (refused_json("\"nf4\"", "\"fp4\""), "quant_type of quant_state is \"fp4\"; must be \"nf4\""),
        (refused_json("{", "["), "quant_state is not JSON"),
        (refused_json("nested_offset", "offset"), "nested_offset of quant_state is missing"),
        (refused_json("256", "0"), "nested_blocksize of quant_state is 0"),
        (refused_json("256", "128"), "nested_absmax has 1 elements; must be 2"),
        (
            refused(|all| part(all, JSON).0 = "w.quant_state.bitsandbytes__fp4".into()),
            "w: is quantised to fp4; only nf4",
        ),
        (refused(|all| all.retain(|made| made.0 != JSON)), "has absmax but no quant_state"),
        (refused(|all| all.retain(|made| made.0 != "w.absmax")), "absmax is missing"),
        (refused(|all| all.retain(|made| made.0 != "w.quant_map")), "quant_map is missing"),
        (refused(|all| part(all, "w").1 = Kind::I8), "w: is quantised to int8"),
        (refused(|all| part(all, "w.quant_map").3[0] ^= 1), "quant_map does not have the values of NF4"),
        (
            refused(|all| {
                let made = part(all, "w.nested_absmax");
                (made.1, made.2) = (Kind::U8, vec![4]);
            }),
            "w.nested_absmax has dtype U8; must be F32",
        ),
    ];
    for (message, words) in cases {
        assert!(message.contains(words), "{message}");
    }
}
